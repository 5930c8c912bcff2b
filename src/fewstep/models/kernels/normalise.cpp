// Batch norm, activation and 2x2 pool of y (examples, height, width, channels), the maximum first,
// and both derivatives; the equations are those of NormaliseAndPool in `block_functions`. A
// maximum's place in its square is 0 to 3, row by row. Every thread takes channels of its own.

#include "norm.h"

namespace {

// Mean and variance are of the first `of` images; of 0, they are given.
struct Shape {
  int64_t n, height, width, channels, of;
  int64_t down() const { return height / 2; }
  int64_t across() const { return width / 2; }
  int64_t count() const { return std::max<int64_t>(of * height * width, 1); }
};

// A row of 2x2 squares: the offset of its first pixel, and of its first maximum, and whether mean
// and variance are of it.
struct Row {
  const Shape &s;
  int64_t begin, pooled, squares;
  bool counts;

  // Calls square(corner, maximum) with the offsets of each square, then rest(offset) for the pixels
  // of these rows that are in none.
  template <class Square, class Rest>
  INLINE void each(int64_t c, Square square, Rest rest) const {
    const int64_t across = s.width * s.channels;
    for (int64_t i = 0; i < squares; i++)
      square(begin + c + 2 * i * s.channels, pooled + c + i * s.channels);
    for (int64_t i = 2 * squares; i < s.width; i++) {
      rest(begin + c + i * s.channels);
      if (squares) rest(begin + c + across + i * s.channels);
    }
  }
};

// Calls at(row, c, j) for each row of squares of some images and each vector of channels, beginning
// with c, the jth of a block.
template <class T, class At>
INLINE void each_row(const Shape &s, int64_t images, int64_t first, int64_t last, At at) {
  for (int64_t image = 0; image < images; image++)
    for (int64_t row = 0; row < s.height; row += 2) {
      const int64_t squares = row + 1 < s.height ? s.across() : 0;
      const Row here{s, (image * s.height + row) * s.width * s.channels,
                     (image * s.down() + row / 2) * s.across() * s.channels, squares,
                     image < s.of};
      for (int64_t c = first, j = 0; c < last; c += Wide<T>::lanes, j++) at(here, c, j);
    }
}

template <class T>
void forward(T *y, const T *gamma, const T *beta, T *z, T *mean, T *var, T *r, T *p, uint8_t *where,
             const Shape &s, T slope, T eps, int threads) {
  const int64_t step[4] = {0, s.channels, s.width * s.channels, (s.width + 1) * s.channels};
  each_block<T>(s.channels, threads, [&](int64_t first, int64_t last) {
    Vec<T> mu[kMost] = {}, v[kMost] = {}, a[kMost], shift[kMost];
    // Sums are of rows and then of all: many terms in one sum lose digits.
    each_row<T>(s, s.of, first, last, [&](const Row &row, int64_t c, int64_t j) {
      Vec<T> sum = {};
      row.each(c, [&](int64_t at, int64_t) { for (int64_t k : step) sum += load(y + at + k); },
               [&](int64_t at) { sum += load(y + at); });
      mu[j] += sum;
    });
    for (int64_t c = first, j = 0; c < last; c += Wide<T>::lanes, j++)
      mu[j] = s.of ? mu[j] / T(s.count()) : load(mean + c);
    each_row<T>(s, s.n, first, last, [&](const Row &row, int64_t c, int64_t j) {
      const Vec<T> m = mu[j];
      Vec<T> sum = {};
      row.each(
          c,
          [&](int64_t at, int64_t pooled) {
            Vec<T> found;
            typename Place<T>::type place = {};
            for (int k = 0; k < 4; k++) {
              const Vec<T> d = load(y + at + step[k]) - m;
              store(y + at + step[k], d);
              sum += d * d;
              if (k == 0) {
                found = d;
                continue;
              }
              const auto higher = (d > found) | (d != d);  // a NaN is kept
              found = higher ? d : found;
              place = higher ? place * 0 + k : place;
            }
            store(p + pooled, found);
            Place<T>::write(where + pooled, place);
          },
          [&](int64_t at) {
            const Vec<T> d = load(y + at) - m;
            store(y + at, d);
            sum += d * d;
          });
      if (row.counts) v[j] += sum;
    });
    for (int64_t c = first, j = 0; c < last; c += Wide<T>::lanes, j++) {
      v[j] = s.of ? v[j] / T(s.count()) : load(var + c);
      a[j] = load(gamma + c) * settle(mu[j], v[j], c, mean, var, r, eps);
      shift[j] = load(beta + c);
    }
    for (int64_t i = 0; i < s.n * s.down() * s.across(); i++)
      for (int64_t c = first, j = 0; c < last; c += Wide<T>::lanes, j++) {
        const Vec<T> value = shift[j] + load(p + i * s.channels + c) * a[j];
        store(z + i * s.channels + c, through(value, value, slope));
      }
  });
}

template <class T>
void backward(T *gy, T *ggamma, T *gbeta, const T *gz, const T *d, const T *gamma,
              const T *z, const T *r, const T *p, const uint8_t *where, const Shape &s, T slope,
              int threads) {
  const int64_t step[4] = {0, s.channels, s.width * s.channels, (s.width + 1) * s.channels};
  each_block<T>(s.channels, threads, [&](int64_t first, int64_t last) {
    Vec<T> by_beta[kMost] = {}, by_gamma[kMost] = {};
    each_row<T>(s, s.n, first, last, [&](const Row &row, int64_t c, int64_t j) {
      Vec<T> sum = {}, with_p = {};
      for (int64_t i = 0; i < row.squares; i++) {
        const int64_t at = row.pooled + c + i * s.channels;
        const Vec<T> active = through(load(gz + at), load(z + at), slope);
        sum += active;
        with_p += active * load(p + at);
      }
      by_beta[j] += sum;
      by_gamma[j] += with_p;
    });
    Terms<T> terms[kMost];
    for (int64_t c = first, j = 0; c < last; c += Wide<T>::lanes, j++)
      terms[j] = terms_of(by_beta[j], by_gamma[j], c, ggamma, gbeta, gamma, r, s.count());
    each_row<T>(s, s.n, first, last, [&](const Row &row, int64_t c, int64_t j) {
      const Terms<T> t = terms[j];
      const Vec<T> none = {}, of = row.counts ? t.of_d : none, by = row.counts ? t.shift : none;
      row.each(
          c,
          [&](int64_t at, int64_t pooled) {
            const auto place = Place<T>::read(where + pooled);
            const Vec<T> peak = through(load(gz + pooled), load(z + pooled), slope) * t.a;
            for (int k = 0; k < 4; k++) {
              const Vec<T> value = load(d + at + step[k]) * of + by;
              store(gy + at + step[k], place == k ? value + peak : value);
            }
          },
          [&](int64_t at) { store(gy + at, load(d + at) * of + by); });
    });
  });
}

// The values of squares where the pool found the maxima.
template <class T>
INLINE Vec<T> picked(const T *corner, const int64_t step[4], typename Place<T>::type place) {
  Vec<T> u = load(corner);
  for (int k = 1; k < 4; k++) u = place == k ? load(corner + step[k]) : u;
  return u;
}

template <class T>
void second(T *to_gz, T *to_y, T *to_gamma, const T *hy, const T *hgamma, const T *hbeta,
            const T *d, const T *gamma, const T *z, const T *r, const T *p, const uint8_t *where,
            const T *gz, const T *ggamma, const T *gbeta, const Shape &s, T slope, int threads) {
  const int64_t step[4] = {0, s.channels, s.width * s.channels, (s.width + 1) * s.channels};
  each_block<T>(s.channels, threads, [&](int64_t first, int64_t last) {
    // The sums of hy and of hy d, where they count, and of ga times hy at the maxima.
    Vec<T> sums[kMost][3] = {};
    each_row<T>(s, s.n, first, last, [&](const Row &row, int64_t c, int64_t j) {
      Vec<T> sum[3] = {};
      const auto add = [&](int64_t at) {
        const Vec<T> value = load(hy + at);
        sum[0] += value;
        sum[1] += value * load(d + at);
      };
      row.each(
          c,
          [&](int64_t at, int64_t pooled) {
            for (int64_t k : step) add(at + k);
            const auto place = Place<T>::read(where + pooled);
            const Vec<T> active = through(load(gz + pooled), load(z + pooled), slope);
            sum[2] += active * picked(hy + at, step, place);
          },
          add);
      for (int i = row.counts ? 0 : 2; i < 3; i++) sums[j][i] += sum[i];
    });
    Factors<T> factors[kMost];
    for (int64_t c = first, j = 0; c < last; c += Wide<T>::lanes, j++)
      factors[j] = factors_of(sums[j], c, to_gamma, hgamma, hbeta, gamma, r, ggamma, gbeta,
                              s.count());
    each_row<T>(s, s.n, first, last, [&](const Row &row, int64_t c, int64_t j) {
      Factors<T> f = factors[j];
      if (!row.counts) f.of_d = f.shift = f.of_h = Vec<T>{};
      const auto flat = [&](int64_t at) {
        return -load(d + at) * f.of_d - f.shift - load(hy + at) * f.of_h;
      };
      row.each(
          c,
          [&](int64_t at, int64_t i) {
            const auto place = Place<T>::read(where + i);
            const Vec<T> value =
                f.to_beta + load(p + i) * f.to_d + picked(hy + at, step, place) * f.a;
            store(to_gz + i, through(value, load(z + i), slope));
            const Vec<T> peak = through(load(gz + i), load(z + i), slope) * f.to_d;
            for (int k = 0; k < 4; k++) {
              const Vec<T> rest = flat(at + step[k]);
              store(to_y + at + step[k], place == k ? rest + peak : rest);
            }
          },
          [&](int64_t at) { store(to_y + at, flat(at)); });
    });
  });
}

}  // namespace

#define ENTRY(T, name)                                                                             \
  extern "C" void normalise_##name(T *y, const T *gamma, const T *beta, T *z, T *mean, T *var,     \
                                   T *r, T *p, uint8_t *where, const int64_t *shape, double slope, \
                                   double eps, int threads) {                                      \
    const Shape s{shape[0], shape[1], shape[2], shape[3], shape[4]};                               \
    forward<T>(y, gamma, beta, z, mean, var, r, p, where, s, slope, eps, threads);                 \
  }                                                                                                \
  extern "C" void normalise_backward_##name(                                                       \
      T *gy, T *ggamma, T *gbeta, const T *gz, const T *d, const T *gamma, const T *z, const T *r, \
      const T *p, const uint8_t *where, const int64_t *shape, double slope, int threads) {         \
    const Shape s{shape[0], shape[1], shape[2], shape[3], shape[4]};                               \
    backward<T>(gy, ggamma, gbeta, gz, d, gamma, z, r, p, where, s, slope, threads);               \
  }                                                                                                \
  extern "C" void normalise_second_##name(                                                         \
      T *to_gz, T *to_y, T *to_gamma, const T *hy, const T *hgamma, const T *hbeta, const T *d,    \
      const T *gamma, const T *z, const T *r, const T *p, const uint8_t *where, const T *gz,       \
      const T *ggamma, const T *gbeta, const int64_t *shape, double slope, int threads) {          \
    const Shape s{shape[0], shape[1], shape[2], shape[3], shape[4]};                               \
    second<T>(to_gz, to_y, to_gamma, hy, hgamma, hbeta, d, gamma, z, r, p, where, gz, ggamma,      \
              gbeta, s, slope, threads);                                                           \
  }

ENTRY(float, float)
ENTRY(double, double)
