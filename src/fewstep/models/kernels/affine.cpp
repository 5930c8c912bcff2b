// z = act(a d + b), a and b by channel, of d (rows, across, channels), and both derivatives; the
// equations are those of Affine in `block_functions`.

#include "common.h"

namespace {

struct Shape {
  int64_t rows, across, channels;
};

// Calls at(offset, c, j) for each row and each vector of channels, beginning with c, the jth of a
// block. Sums are of rows and then of all: many terms in one sum lose digits.
template <class T, class At>
INLINE void each_row(const Shape &s, int64_t first, int64_t last, At at) {
  for (int64_t row = 0; row < s.rows; row++)
    for (int64_t c = first, j = 0; c < last; c += Wide<T>::lanes, j++)
      at(row * s.across * s.channels + c, c, j);
}

template <class T>
void forward(T *z, const T *d, const T *a, const T *b, const Shape &s, T slope, int threads) {
  each_block<T>(s.channels, threads, [&](int64_t first, int64_t last) {
    each_row<T>(s, first, last, [&](int64_t at, int64_t c, int64_t) {
      const Vec<T> scale = load(a + c), shift = load(b + c);
      for (int64_t i = 0; i < s.across; i++, at += s.channels) {
        const Vec<T> value = shift + load(d + at) * scale;
        store(z + at, through(value, value, slope));
      }
    });
  });
}

template <class T>
void backward(T *gd, T *ga, T *gb, const T *gz, const T *d, const T *a, const T *z, const Shape &s,
              T slope, int threads) {
  each_block<T>(s.channels, threads, [&](int64_t first, int64_t last) {
    Vec<T> by_a[kMost] = {}, by_b[kMost] = {};
    each_row<T>(s, first, last, [&](int64_t at, int64_t c, int64_t j) {
      const Vec<T> scale = load(a + c);
      Vec<T> sum = {}, with_d = {};
      for (int64_t i = 0; i < s.across; i++, at += s.channels) {
        const Vec<T> active = through(load(gz + at), load(z + at), slope);
        store(gd + at, active * scale);
        sum += active;
        with_d += active * load(d + at);
      }
      by_a[j] += with_d;
      by_b[j] += sum;
    });
    for (int64_t c = first, j = 0; c < last; c += Wide<T>::lanes, j++) {
      store(ga + c, by_a[j]);
      store(gb + c, by_b[j]);
    }
  });
}

template <class T>
void second(T *to_gz, T *to_d, T *to_a, const T *hd, const T *ha, const T *hb, const T *d,
            const T *a, const T *z, const T *gz, const Shape &s, T slope, int threads) {
  each_block<T>(s.channels, threads, [&](int64_t first, int64_t last) {
    Vec<T> by_a[kMost] = {};
    each_row<T>(s, first, last, [&](int64_t at, int64_t c, int64_t j) {
      const Vec<T> scale = load(a + c), by_scale = load(ha + c), shift = load(hb + c);
      Vec<T> sum = {};
      for (int64_t i = 0; i < s.across; i++, at += s.channels) {
        const Vec<T> h = load(hd + at), result = load(z + at);
        const Vec<T> active = through(load(gz + at), result, slope);
        store(to_gz + at, through(shift + load(d + at) * by_scale + h * scale, result, slope));
        store(to_d + at, active * by_scale);
        sum += active * h;
      }
      by_a[j] += sum;
    });
    for (int64_t c = first, j = 0; c < last; c += Wide<T>::lanes, j++) store(to_a + c, by_a[j]);
  });
}

}  // namespace

#define ENTRY(T, name)                                                                             \
  extern "C" void affine_##name(T *z, const T *d, const T *a, const T *b, const int64_t *shape,    \
                                double slope, int threads) {                                       \
    const Shape s{shape[0], shape[1], shape[2]};                                                   \
    forward<T>(z, d, a, b, s, slope, threads);                                                     \
  }                                                                                                \
  extern "C" void affine_backward_##name(T *gd, T *ga, T *gb, const T *gz, const T *d, const T *a, \
                                         const T *z, const int64_t *shape, double slope,           \
                                         int threads) {                                            \
    const Shape s{shape[0], shape[1], shape[2]};                                                   \
    backward<T>(gd, ga, gb, gz, d, a, z, s, slope, threads);                                       \
  }                                                                                                \
  extern "C" void affine_second_##name(T *to_gz, T *to_d, T *to_a, const T *hd, const T *ha,       \
                                       const T *hb, const T *d, const T *a, const T *z,            \
                                       const T *gz, const int64_t *shape, double slope,            \
                                       int threads) {                                              \
    const Shape s{shape[0], shape[1], shape[2]};                                                   \
    second<T>(to_gz, to_d, to_a, hd, ha, hb, d, a, z, gz, s, slope, threads);                      \
  }

ENTRY(float, float)
ENTRY(double, double)
