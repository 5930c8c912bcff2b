// Batch norm, activation and 2x2 pool of y (examples, height, width, channels), the maximum first,
// and both derivatives; the equations are those of NormaliseAndPool in `block_functions`. A
// maximum's place in its square is 0 to 3, row by row. Every thread takes channels of its own.

#include "common.h"

namespace {

struct Shape {
  int64_t n, height, width, channels;
  int64_t down() const { return height / 2; }
  int64_t across() const { return width / 2; }
  int64_t count() const { return n * height * width; }
};

// Calls at(c) for each vector of channels beginning with c; a thread has neighbours in turn.
template <class T, class At> void each_vector(const Shape &s, int threads, At at) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t c = 0; c < s.channels; c += Wide<T>::lanes) at(c);
}

// Calls square(corner, pooled) with the offsets of each 2x2 square of a row of squares, then
// rest(offset) for the pixels of these rows that are in none; line() ends a row.
template <class Square, class Rest, class Line>
INLINE void each_row(const Shape &s, Square square, Rest rest, Line line) {
  const int64_t across = s.width * s.channels;
  for (int64_t image = 0; image < s.n; image++)
    for (int64_t row = 0; row < s.height; row += 2) {
      const int64_t begin = (image * s.height + row) * across;
      const int64_t paired = row + 1 < s.height ? s.across() : 0;
      const int64_t pooled = (image * s.down() + row / 2) * s.across() * s.channels;
      for (int64_t i = 0; i < paired; i++)
        square(begin + 2 * i * s.channels, pooled + i * s.channels);
      for (int64_t i = 2 * paired; i < s.width; i++) {
        rest(begin + i * s.channels);
        if (paired) rest(begin + across + i * s.channels);
      }
      line();
    }
}

template <class T>
void forward(T *y, const T *gamma, const T *beta, T *z, T *mean, T *var, T *r, T *p, uint8_t *where,
             const Shape &s, T slope, T eps, int threads) {
  const int64_t step[4] = {0, s.channels, s.width * s.channels, (s.width + 1) * s.channels};
  each_vector<T>(s, threads, [&](int64_t c) {
    Vec<T> sum = {}, row = {};
    const auto add = [&] { sum += row, row = Vec<T>{}; };  // many terms in one sum lose digits
    each_row(
        s,
        [&](int64_t at, int64_t) { for (int64_t k : step) row += load(y + at + k + c); },
        [&](int64_t at) { row += load(y + at + c); }, add);
    const Vec<T> mu = sum / T(s.count());
    sum = Vec<T>{};
    each_row(
        s,
        [&](int64_t at, int64_t pooled) {
          Vec<T> found;
          typename Place<T>::type place = {};
          for (int k = 0; k < 4; k++) {
            const Vec<T> d = load(y + at + step[k] + c) - mu;
            store(y + at + step[k] + c, d);
            row += d * d;
            if (k == 0) {
              found = d;
              continue;
            }
            const auto higher = (d > found) | (d != d);  // a NaN is kept
            found = higher ? d : found;
            place = higher ? place * 0 + k : place;
          }
          store(p + pooled + c, found);
          Place<T>::write(where + pooled + c, place);
        },
        [&](int64_t at) {
          const Vec<T> d = load(y + at + c) - mu;
          store(y + at + c, d);
          row += d * d;
        },
        add);
    const Vec<T> v = sum / T(s.count());
    Vec<T> root;
    for (int l = 0; l < Wide<T>::lanes; l++) root[l] = T(1) / std::sqrt(v[l] + eps);
    store(mean + c, mu);
    store(var + c, v);
    store(r + c, root);
    const Vec<T> a = load(gamma + c) * root, shift = load(beta + c);
    for (int64_t i = 0; i < s.n * s.down() * s.across(); i++) {
      const Vec<T> value = shift + load(p + i * s.channels + c) * a;
      store(z + i * s.channels + c, value > 0 ? value : value * slope);
    }
  });
}

template <class T>
void backward(T *gy, T *ga, T *ggamma, T *gbeta, const T *gz, const T *d, const T *gamma,
              const T *z, const T *r, const T *p, const uint8_t *where, const Shape &s, T slope,
              int threads) {
  const int64_t step[4] = {0, s.channels, s.width * s.channels, (s.width + 1) * s.channels};
  each_vector<T>(s, threads, [&](int64_t c) {
    Vec<T> by_beta = {}, by_gamma = {};
    for (int64_t row = 0; row < s.n * s.down(); row++) {
      Vec<T> sum = {}, with_p = {};
      for (int64_t i = row * s.across(); i < (row + 1) * s.across(); i++) {
        const int64_t at = i * s.channels + c;
        const Vec<T> g = load(gz + at), active = load(z + at) > 0 ? g : g * slope;
        store(ga + at, active);
        sum += active;
        with_p += active * load(p + at);
      }
      by_beta += sum;
      by_gamma += with_p;
    }
    const Vec<T> root = load(r + c), a = load(gamma + c) * root;
    by_gamma *= root;
    store(gbeta + c, by_beta);
    store(ggamma + c, by_gamma);
    const Vec<T> of_d = a * root * by_gamma / T(-s.count()), shift = a * by_beta / T(-s.count());
    each_row(
        s,
        [&](int64_t at, int64_t pooled) {
          const auto place = Place<T>::read(where + pooled + c);
          const Vec<T> peak = load(ga + pooled + c) * a;
          for (int k = 0; k < 4; k++) {
            const Vec<T> value = load(d + at + step[k] + c) * of_d + shift;
            store(gy + at + step[k] + c, place == k ? value + peak : value);
          }
        },
        [&](int64_t at) { store(gy + at + c, load(d + at + c) * of_d + shift); }, [] {});
  });
}

// The values of squares where the pool found the maxima.
template <class T>
INLINE Vec<T> picked(const T *corner, const int64_t step[4], typename Place<T>::type place) {
  Vec<T> u = load(corner);
  for (int k = 1; k < 4; k++) u = place == k ? load(corner + step[k]) : u;
  return u;
}

// The sums of hy, of hy d, and of ga times hy at the maxima, of the channels from c on.
template <class T>
void sums(const T *hy, const T *d, const T *ga, const uint8_t *where, const Shape &s,
          const int64_t step[4], int64_t c, Vec<T> sum[3]) {
  Vec<T> row[3] = {};
  const auto add = [&](int64_t at) {
    const Vec<T> value = load(hy + at + c);
    row[0] += value;
    row[1] += value * load(d + at + c);
  };
  each_row(
      s,
      [&](int64_t at, int64_t pooled) {
        for (int k = 0; k < 4; k++) add(at + step[k]);
        const auto place = Place<T>::read(where + pooled + c);
        row[2] += load(ga + pooled + c) * picked(hy + at + c, step, place);
      },
      add,
      [&] {
        for (int i = 0; i < 3; i++) sum[i] += row[i], row[i] = Vec<T>{};
      });
}

template <class T>
void second(T *to_gz, T *to_y, T *to_gamma, const T *hy, const T *hgamma, const T *hbeta,
            const T *d, const T *gamma, const T *z, const T *r, const T *p, const uint8_t *where,
            const T *ga, const T *ggamma, const T *gbeta, const Shape &s, T slope, int threads) {
  const int64_t step[4] = {0, s.channels, s.width * s.channels, (s.width + 1) * s.channels};
  each_vector<T>(s, threads, [&](int64_t c) {
    Vec<T> sum[3] = {};
    sums(hy, d, ga, where, s, step, c, sum);
    const Vec<T> root = load(r + c), a = load(gamma + c) * root, r_n = root / T(s.count());
    const Vec<T> by_gamma = load(ggamma + c), by_beta = load(gbeta + c);
    const Vec<T> h0 = sum[0] / T(s.count()), h1 = sum[1] * r_n;
    const Vec<T> to_a = sum[2] - by_beta * h0 - by_gamma * h1;
    const Vec<T> to_ggamma = load(hgamma + c) - a * h1, to_gbeta = load(hbeta + c) - a * h0;
    const Vec<T> to_p = to_ggamma * root, from = a * by_gamma;
    const Vec<T> of_d = (to_a * a + to_ggamma * by_gamma - from * h1) * root * r_n;
    const Vec<T> shift = (to_ggamma * by_beta - from * h0) * r_n, of_hy = from * r_n;
    store(to_gamma + c, to_a * root);
    const auto flat = [&](int64_t at) {
      return -load(d + at) * of_d - shift - load(hy + at) * of_hy;
    };
    each_row(
        s,
        [&](int64_t at, int64_t pooled) {
          const int64_t i = pooled + c;
          const auto place = Place<T>::read(where + i);
          const Vec<T> value =
              to_gbeta + load(p + i) * to_p + picked(hy + at + c, step, place) * a;
          store(to_gz + i, load(z + i) > 0 ? value : value * slope);
          const Vec<T> peak = load(ga + i) * to_p;
          for (int k = 0; k < 4; k++) {
            const Vec<T> rest = flat(at + step[k] + c);
            store(to_y + at + step[k] + c, place == k ? rest + peak : rest);
          }
        },
        [&](int64_t at) { store(to_y + at + c, flat(at + c)); }, [] {});
  });
}

}  // namespace

#define ENTRY(T, name)                                                                             \
  extern "C" void normalise_##name(T *y, const T *gamma, const T *beta, T *z, T *mean, T *var,     \
                                   T *r, T *p, uint8_t *where, const int64_t *shape, double slope, \
                                   double eps, int threads) {                                      \
    const Shape s{shape[0], shape[1], shape[2], shape[3]};                                         \
    forward<T>(y, gamma, beta, z, mean, var, r, p, where, s, slope, eps, threads);                 \
  }                                                                                                \
  extern "C" void normalise_backward_##name(                                                       \
      T *gy, T *ga, T *ggamma, T *gbeta, const T *gz, const T *d, const T *gamma, const T *z,      \
      const T *r, const T *p, const uint8_t *where, const int64_t *shape, double slope,            \
      int threads) {                                                                               \
    const Shape s{shape[0], shape[1], shape[2], shape[3]};                                         \
    backward<T>(gy, ga, ggamma, gbeta, gz, d, gamma, z, r, p, where, s, slope, threads);           \
  }                                                                                                \
  extern "C" void normalise_second_##name(                                                         \
      T *to_gz, T *to_y, T *to_gamma, const T *hy, const T *hgamma, const T *hbeta, const T *d,    \
      const T *gamma, const T *z, const T *r, const T *p, const uint8_t *where, const T *ga,       \
      const T *ggamma, const T *gbeta, const int64_t *shape, double slope, int threads) {          \
    const Shape s{shape[0], shape[1], shape[2], shape[3]};                                         \
    second<T>(to_gz, to_y, to_gamma, hy, hgamma, hbeta, d, gamma, z, r, p, where, ga, ggamma,      \
              gbeta, s, slope, threads);                                                           \
  }

ENTRY(float, float)
ENTRY(double, double)
