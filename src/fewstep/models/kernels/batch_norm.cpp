// Batch norm of y (examples, pixels, channels) and both its derivatives; the equations are those of
// BatchNorm in `layer_functions`. Every thread takes channels of its own.

#include "norm.h"

namespace {

// Mean and variance are of the first `of` images; of 0, they are given.
struct Images {
  int64_t n, pixels, channels, of;
  int64_t count() const { return std::max<int64_t>(of * pixels, 1); }
};

// Calls at(offset, pixels, counts, j) for runs of pixels of some images and each vector of
// channels, the jth of a block; `counts`, whether mean and variance are of them. A run's sums come
// before the sum of all, as many terms in one sum lose digits.
template <class T, class At>
INLINE void each_run(const Images &s, int64_t images, int64_t first, int64_t last, At at) {
  constexpr int64_t most = 64;
  for (int64_t image = 0; image < images; image++)
    for (int64_t p = 0; p < s.pixels; p += most)
      for (int64_t c = first, j = 0; c < last; c += Wide<T>::lanes, j++)
        at((image * s.pixels + p) * s.channels + c, std::min(most, s.pixels - p), image < s.of, j);
}

template <class T>
void forward(const T *y, const T *gamma, const T *beta, T *z, T *mean, T *var, T *r,
             const Images &s, T eps, int threads) {
  each_block<T>(s.channels, threads, [&](int64_t first, int64_t last) {
    Vec<T> mu[kMost] = {}, v[kMost] = {}, a[kMost], shift[kMost];
    int64_t seen[kMost] = {};
    // A run's moments join those before it, so that y is read once.
    each_run<T>(s, s.of, first, last, [&](int64_t at, int64_t pixels, bool, int64_t j) {
      Vec<T> sum = {}, squares = {};
      for (int64_t i = 0; i < pixels; i++) sum += load(y + at + i * s.channels);
      const Vec<T> own = sum / T(pixels);
      for (int64_t i = 0; i < pixels; i++) {
        const Vec<T> d = load(y + at + i * s.channels) - own;
        squares += d * d;
      }
      const Vec<T> apart = own - mu[j];
      const T share = T(pixels) / T(seen[j] + pixels);
      v[j] += squares + apart * apart * (T(seen[j]) * share);
      mu[j] += apart * share;
      seen[j] += pixels;
    });
    for (int64_t c = first, j = 0; c < last; c += Wide<T>::lanes, j++) {
      mu[j] = s.of ? mu[j] : load(mean + c);
      v[j] = s.of ? v[j] / T(s.count()) : load(var + c);
      a[j] = load(gamma + c) * settle(mu[j], v[j], c, mean, var, r, eps);
      shift[j] = load(beta + c);
    }
    each_run<T>(s, s.n, first, last, [&](int64_t at, int64_t pixels, bool, int64_t j) {
      for (int64_t i = at; i < at + pixels * s.channels; i += s.channels)
        store(z + i, (load(y + i) - mu[j]) * a[j] + shift[j]);
    });
  });
}

template <class T>
void backward(T *gy, T *ggamma, T *gbeta, const T *g, const T *y, const T *gamma, const T *mean,
              const T *r, const Images &s, int threads) {
  each_block<T>(s.channels, threads, [&](int64_t first, int64_t last) {
    Vec<T> mu[kMost], by_beta[kMost] = {}, by_gamma[kMost] = {};
    for (int64_t c = first, j = 0; c < last; c += Wide<T>::lanes, j++) mu[j] = load(mean + c);
    each_run<T>(s, s.n, first, last, [&](int64_t at, int64_t pixels, bool, int64_t j) {
      Vec<T> sum = {}, with_d = {};
      for (int64_t i = at; i < at + pixels * s.channels; i += s.channels) {
        sum += load(g + i);
        with_d += load(g + i) * (load(y + i) - mu[j]);
      }
      by_beta[j] += sum;
      by_gamma[j] += with_d;
    });
    Terms<T> terms[kMost];
    for (int64_t c = first, j = 0; c < last; c += Wide<T>::lanes, j++)
      terms[j] = terms_of(by_beta[j], by_gamma[j], c, ggamma, gbeta, gamma, r, s.count());
    each_run<T>(s, s.n, first, last, [&](int64_t at, int64_t pixels, bool counts, int64_t j) {
      const Terms<T> t = terms[j];
      const Vec<T> none = {}, of = counts ? t.of_d : none, shift = counts ? t.shift : none;
      for (int64_t i = at; i < at + pixels * s.channels; i += s.channels)
        store(gy + i, load(g + i) * t.a + (load(y + i) - mu[j]) * of + shift);
    });
  });
}

template <class T>
void second(T *to_g, T *to_y, T *to_gamma, const T *h, const T *hgamma, const T *hbeta,
            const T *g, const T *y, const T *gamma, const T *mean, const T *r, const T *ggamma,
            const T *gbeta, const Images &s, int threads) {
  each_block<T>(s.channels, threads, [&](int64_t first, int64_t last) {
    // The sums of h and of h d, where they count, and of g h.
    Vec<T> mu[kMost], sums[kMost][3] = {};
    for (int64_t c = first, j = 0; c < last; c += Wide<T>::lanes, j++) mu[j] = load(mean + c);
    each_run<T>(s, s.n, first, last, [&](int64_t at, int64_t pixels, bool counts, int64_t j) {
      Vec<T> sum[3] = {};
      for (int64_t i = at; i < at + pixels * s.channels; i += s.channels) {
        const Vec<T> value = load(h + i);
        sum[0] += value;
        sum[1] += value * (load(y + i) - mu[j]);
        sum[2] += value * load(g + i);
      }
      for (int k = counts ? 0 : 2; k < 3; k++) sums[j][k] += sum[k];
    });
    Factors<T> factors[kMost];
    for (int64_t c = first, j = 0; c < last; c += Wide<T>::lanes, j++)
      factors[j] = factors_of(sums[j], c, to_gamma, hgamma, hbeta, gamma, r, ggamma, gbeta,
                              s.count());
    each_run<T>(s, s.n, first, last, [&](int64_t at, int64_t pixels, bool counts, int64_t j) {
      Factors<T> f = factors[j];
      if (!counts) f.of_d = f.shift = f.of_h = Vec<T>{};
      for (int64_t i = at; i < at + pixels * s.channels; i += s.channels) {
        const Vec<T> d = load(y + i) - mu[j], value = load(h + i);
        store(to_g + i, f.to_beta + d * f.to_d + value * f.a);
        store(to_y + i, load(g + i) * f.to_d - d * f.of_d - f.shift - value * f.of_h);
      }
    });
  });
}

}  // namespace

#define ENTRY(T, name)                                                                             \
  extern "C" void batch_norm_##name(const T *y, const T *gamma, const T *beta, T *z, T *mean,      \
                                    T *var, T *r, const int64_t *shape, double eps, int threads) { \
    const Images s{shape[0], shape[1], shape[2], shape[3]};                                        \
    forward<T>(y, gamma, beta, z, mean, var, r, s, eps, threads);                                  \
  }                                                                                                \
  extern "C" void batch_norm_backward_##name(T *gy, T *ggamma, T *gbeta, const T *g, const T *y,   \
                                             const T *gamma, const T *mean, const T *r,            \
                                             const int64_t *shape, int threads) {                  \
    const Images s{shape[0], shape[1], shape[2], shape[3]};                                        \
    backward<T>(gy, ggamma, gbeta, g, y, gamma, mean, r, s, threads);                              \
  }                                                                                                \
  extern "C" void batch_norm_second_##name(                                                        \
      T *to_g, T *to_y, T *to_gamma, const T *h, const T *hgamma, const T *hbeta, const T *g,      \
      const T *y, const T *gamma, const T *mean, const T *r, const T *ggamma, const T *gbeta,      \
      const int64_t *shape, int threads) {                                                         \
    const Images s{shape[0], shape[1], shape[2], shape[3]};                                        \
    second<T>(to_g, to_y, to_gamma, h, hgamma, hbeta, g, y, gamma, mean, r, ggamma, gbeta, s,      \
              threads);                                                                            \
  }

ENTRY(float, float)
ENTRY(double, double)
