// 3x3 convolutions of stride 1 and padding 1 by Winograd's F(4x4, 3x3), each group of channels with
// filters of its own, images channels-last, a multiple of 16 channels in a group.
//
//   y  = A^T [ (G w G^T) . (B^T x B) ] A        over tiles of 4x4 outputs and 6x6 inputs
//   gw = G^T [ (B^T x B) . (A g A^T) ] G
//
// "." sums over channels (y) or over tiles (gw), as 36 products of matrices. The points are
// 0, +-3/4, +-3/2 and infinity: every coefficient of A and B is a short binary fraction, and in
// float32 the error is a third of that of the usual 0, +-1, +-2.

#include <cstring>

#include "common.h"

namespace {

constexpr int kTile = 6, kOut = 4, kPoints = kTile * kTile;
constexpr int kBlock = 30;  // tiles at once: their transforms stay in the second-level cache

// A product keeps kRows x kColumns vectors of sums in registers.
constexpr int kRows = 6, kColumns = kRegisters == 32 ? 4 : 2;

// a^2 = 9/16, b^2 = 9/4
#define A1 T(0.75)
#define B1 T(1.5)
#define A2 T(0.5625)
#define B2 T(2.25)
#define AB T(1.265625)
#define SUM T(2.8125)

// t = B^T d
template <class T> inline __attribute__((always_inline)) void input_transform(const Vec<T> d[6], Vec<T> t[6]) {
  Vec<T> e = d[4] - B2 * d[2], o = A1 * (d[3] - B2 * d[1]);
  Vec<T> f = d[4] - A2 * d[2], p = B1 * (d[3] - A2 * d[1]);
  t[0] = AB * d[0] - SUM * d[2] + d[4];
  t[1] = e + o;
  t[2] = e - o;
  t[3] = f + p;
  t[4] = f - p;
  t[5] = AB * d[1] - SUM * d[3] + d[5];
}

// y = A^T m
template <class T> inline __attribute__((always_inline)) void output_transform(const Vec<T> m[6], Vec<T> y[4]) {
  Vec<T> e = m[1] + m[2], o = A1 * (m[1] - m[2]);
  Vec<T> f = m[3] + m[4], p = B1 * (m[3] - m[4]);
  y[0] = m[0] + e + f;
  y[1] = o + p;
  y[2] = A2 * e + B2 * f;
  y[3] = A2 * o + B2 * p + m[5];
}

// m = A g
template <class T> inline __attribute__((always_inline)) void gradient_transform(const Vec<T> g[4], Vec<T> m[6]) {
  Vec<T> e = g[0] + A2 * g[2], o = A1 * (g[1] + A2 * g[3]);
  Vec<T> f = g[0] + B2 * g[2], p = B1 * (g[1] + B2 * g[3]);
  m[0] = g[0];
  m[1] = e + o;
  m[2] = e - o;
  m[3] = f + p;
  m[4] = f - p;
  m[5] = g[3];
}

// 1/N of the points 0, +-a, +-b
#define N0 T(1.0 / 1.265625)
#define NA T(1.0 / (2 * 0.5625 * (0.5625 - 2.25)))
#define NB T(1.0 / (2 * 2.25 * (2.25 - 0.5625)))

// u = G w
template <class T> inline __attribute__((always_inline)) void filter_transform(const Vec<T> w[3], Vec<T> u[6]) {
  Vec<T> e = NA * (w[0] + A2 * w[2]), o = (NA * A1) * w[1];
  Vec<T> f = NB * (w[0] + B2 * w[2]), p = (NB * B1) * w[1];
  u[0] = N0 * w[0];
  u[1] = e + o;
  u[2] = e - o;
  u[3] = f + p;
  u[4] = f - p;
  u[5] = w[2];
}

// w = G^T u
template <class T> inline __attribute__((always_inline)) void filter_gradient(const Vec<T> u[6], Vec<T> w[3]) {
  Vec<T> e = NA * (u[1] + u[2]), o = (NA * A1) * (u[1] - u[2]);
  Vec<T> f = NB * (u[3] + u[4]), p = (NB * B1) * (u[3] - u[4]);
  w[0] = N0 * u[0] + e + f;
  w[1] = o + p;
  w[2] = A2 * e + B2 * f + u[5];
}

// out = F in F^T: `from` gives the n x n vectors of in, `to` takes the m x m of out
template <class T, int n, int m, void (*F)(const Vec<T> *, Vec<T> *), class From, class To>
inline __attribute__((always_inline)) void both_sides(From from, To to) {
  Vec<T> half[n * m];
#pragma GCC unroll 6
  for (int j = 0; j < n; j++) {
    Vec<T> column[n], image[m];
#pragma GCC unroll 6
    for (int i = 0; i < n; i++) column[i] = from(i, j);
    F(column, image);
#pragma GCC unroll 6
    for (int i = 0; i < m; i++) half[i * n + j] = image[i];
  }
#pragma GCC unroll 6
  for (int i = 0; i < m; i++) {
    Vec<T> image[m];
    F(half + i * n, image);
#pragma GCC unroll 6
    for (int j = 0; j < m; j++) to(i, j, image[j]);
  }
}

// c[i][j] (+)= sum_k a[i * row + k * column] b[k][j] for R rows and C vectors
template <class T, int R, int C>
inline __attribute__((always_inline)) void panel(const T *a, int64_t row, int64_t column, const T *b,
                                                 int64_t wide, int64_t depth, T *c, int64_t c_wide,
                                                 bool add) {
  constexpr int lanes = Wide<T>::lanes;
  Vec<T> sum[R][C];
#pragma GCC unroll 8
  for (int i = 0; i < R; i++)
#pragma GCC unroll 4
    for (int j = 0; j < C; j++)
      sum[i][j] = add ? load(c + i * c_wide + j * lanes) : Vec<T>{};
  for (int64_t k = 0; k < depth; k++) {
    Vec<T> right[C];
#pragma GCC unroll 4
    for (int j = 0; j < C; j++) right[j] = load(b + k * wide + j * lanes);
#pragma GCC unroll 8
    for (int i = 0; i < R; i++) {
      T left = a[i * row + k * column];
#pragma GCC unroll 4
      for (int j = 0; j < C; j++) sum[i][j] += left * right[j];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < R; i++)
#pragma GCC unroll 4
    for (int j = 0; j < C; j++) store(c + i * c_wide + j * lanes, sum[i][j]);
}

template <class T, int C>
void columns(const T *a, int64_t rows, int64_t row, int64_t column, const T *b, int64_t wide,
             int64_t depth, T *c, int64_t c_wide, bool add) {
  int64_t i = 0;
  for (; i + kRows <= rows; i += kRows)
    panel<T, kRows, C>(a + i * row, row, column, b, wide, depth, c + i * c_wide, c_wide, add);
  for (; i + 2 <= rows; i += 2)
    panel<T, 2, C>(a + i * row, row, column, b, wide, depth, c + i * c_wide, c_wide, add);
  for (; i < rows; i++)
    panel<T, 1, C>(a + i * row, row, column, b, wide, depth, c + i * c_wide, c_wide, add);
}

// c = a b or c += a b; c has `wide` columns, a multiple of the lanes
template <class T>
void product(const T *a, int64_t rows, int64_t row, int64_t column, const T *b, int64_t depth, T *c,
             int64_t wide, bool add) {
  constexpr int lanes = Wide<T>::lanes;
  int64_t j = 0;
  for (; j + kColumns * lanes <= wide; j += kColumns * lanes)
    columns<T, kColumns>(a, rows, row, column, b + j, wide, depth, c + j, wide, add);
  for (; j + 2 * lanes <= wide; j += 2 * lanes)
    columns<T, 2>(a, rows, row, column, b + j, wide, depth, c + j, wide, add);
  for (; j < wide; j += lanes)
    columns<T, 1>(a, rows, row, column, b + j, wide, depth, c + j, wide, add);
}

struct Shape {
  int64_t n, height, width, groups, in, out;  // in, out: channels of a group
  int64_t across() const { return (width + kOut - 1) / kOut; }
  int64_t down() const { return (height + kOut - 1) / kOut; }
  int64_t tiles() const { return n * across() * down(); }
};

// Where a tile lies: its image, and its first row and column.
struct Corner {
  int64_t image, y, x;
  Corner(int64_t tile, const Shape &s) {
    const int64_t row = tile / s.across();
    image = row / s.down();
    y = row % s.down() * kOut;
    x = tile % s.across() * kOut;
  }
};

// v[point][tile][channel] of tiles first..first+count of a group's images, `wide` channels of `all`
template <class T, int size, void (*F)(const Vec<T> *, Vec<T> *)>
void transform_tiles(const T *x, const Shape &s, int64_t all, int64_t wide, int64_t first,
                     int64_t count, const T *zeros, T *v) {
  constexpr int lanes = Wide<T>::lanes, before = size == kTile ? 1 : 0;
  const int64_t point = count * wide;
  for (int64_t t = 0; t < count; t++) {
    const Corner at(first + t, s);
    const T *corner = x + ((at.image * s.height + at.y - before) * s.width + at.x - before) * all;
    const T *pixel[size * size];
    for (int i = 0; i < size; i++)
      for (int j = 0; j < size; j++) {
        const bool inside = uint64_t(at.y - before + i) < uint64_t(s.height) &&
                            uint64_t(at.x - before + j) < uint64_t(s.width);
        pixel[i * size + j] = inside ? corner + (i * s.width + j) * all : zeros;
      }
    for (int64_t c = 0; c < wide; c += lanes) {
      T *to = v + t * wide + c;
      both_sides<T, size, kTile, F>(
          [&](int i, int j) { return load(pixel[i * size + j] + c); },
          [&](int i, int j, Vec<T> value) { store(to + (i * kTile + j) * point, value); });
    }
  }
}

struct Strides {
  int64_t out, in, down, across;
};

// u[point][from][to]: filters of a group; `turned` for the transposed convolution
template <class T>
void transform_filters(const T *w, const Strides &by, int64_t from, int64_t to, bool turned, T *u) {
  constexpr int lanes = Wide<T>::lanes;
  int64_t of_from = turned ? by.out : by.in, of_to = turned ? by.in : by.out;
  for (int64_t t = 0; t < to; t += lanes)
    for (int64_t f = 0; f < from; f++) {
      const T *tap = w + f * of_from + t * of_to;
      T *at = u + f * to + t;
      both_sides<T, 3, kTile, filter_transform<T>>(
          [&](int i, int j) {
            const T *p = tap + (turned ? (2 - i) * by.down + (2 - j) * by.across
                                       : i * by.down + j * by.across);
            if (of_to == 1) return load(p);
            Vec<T> value;
            for (int l = 0; l < lanes; l++) value[l] = p[l * of_to];
            return value;
          },
          [&](int i, int j, Vec<T> value) { store(at + (i * kTile + j) * from * to, value); });
    }
}

template <class T> struct Factors {
  const T *x, *w;
  Strides by;
};

template <class T>
void convolve(T *y, const Factors<T> *pairs, int count, const Shape &s, bool turned, int threads) {
  constexpr int lanes = Wide<T>::lanes;
  const int64_t slices = (threads + s.groups - 1) / s.groups, items = s.groups * slices;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (int64_t item = 0; item < items; item++) {
    const int64_t group = item / slices, slice = item % slices;
    const int64_t begin = s.tiles() * slice / slices, end = s.tiles() * (slice + 1) / slices;
    const int64_t filters = kPoints * s.in * s.out;
    T *u = static_cast<T *>(scratch(0, count * filters * sizeof(T)));
    T *v = static_cast<T *>(scratch(1, kPoints * kBlock * s.in * sizeof(T)));
    T *m = static_cast<T *>(scratch(2, kPoints * kBlock * s.out * sizeof(T)));
    T *zeros = static_cast<T *>(scratch(3, std::max(s.in, s.out) * sizeof(T)));
    std::fill_n(zeros, std::max(s.in, s.out), T(0));
    for (int p = 0; p < count; p++) {
      const Strides &by = pairs[p].by;
      const T *w = pairs[p].w + group * (turned ? s.in : s.out) * by.out;
      transform_filters(w, by, s.in, s.out, turned, u + p * filters);
    }
    for (int64_t first = begin; first < end; first += kBlock) {
      const int64_t rows = std::min<int64_t>(kBlock, end - first);
      for (int p = 0; p < count; p++) {
        transform_tiles<T, kTile, input_transform<T>>(pairs[p].x + group * s.in, s,
                                                      s.groups * s.in, s.in, first, rows, zeros, v);
        for (int i = 0; i < kPoints; i++)
          product(v + i * rows * s.in, rows, s.in, 1, u + p * filters + i * s.in * s.out, s.in,
                  m + i * rows * s.out, s.out, p > 0);
      }
      for (int64_t t = 0; t < rows; t++) {
        const Corner at(first + t, s);
        const int64_t pixel = s.groups * s.out, line = s.width * pixel;
        T *corner = y + (at.image * s.height + at.y) * line + at.x * pixel + group * s.out;
        const int high = std::min<int64_t>(kOut, s.height - at.y);
        const int wide = std::min<int64_t>(kOut, s.width - at.x);
        for (int64_t c = 0; c < s.out; c += lanes) {
          const T *from = m + t * s.out + c;
          T *to = corner + c;
          auto in = [&](int i, int j) { return load(from + (i * kTile + j) * rows * s.out); };
          if (high == kOut && wide == kOut)
            both_sides<T, kTile, kOut, output_transform<T>>(
                in, [&](int i, int j, Vec<T> v) { store(to + i * line + j * pixel, v); });
          else
            both_sides<T, kTile, kOut, output_transform<T>>(in, [&](int i, int j, Vec<T> v) {
              if (i < high && j < wide) store(to + i * line + j * pixel, v);
            });
        }
      }
    }
  }
}

// gw (groups x out, 3, 3, in) = sum over images
template <class T>
void correlate(T *gw, const T *x, const T *g, const Shape &s, int threads) {
  constexpr int lanes = Wide<T>::lanes;
  const int64_t slices = (threads + s.groups - 1) / s.groups, items = s.groups * slices;
  const int64_t size = s.out * 9 * s.in;
  T *parts = slices == 1 ? gw : static_cast<T *>(std::malloc(items * size * sizeof(T)));
  if (!parts) std::abort();
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (int64_t item = 0; item < items; item++) {
    const int64_t group = item / slices, slice = item % slices;
    const int64_t begin = s.tiles() * slice / slices, end = s.tiles() * (slice + 1) / slices;
    T *u = static_cast<T *>(scratch(0, kPoints * s.in * s.out * sizeof(T)));
    T *v = static_cast<T *>(scratch(1, kPoints * kBlock * s.in * sizeof(T)));
    T *m = static_cast<T *>(scratch(2, kPoints * kBlock * s.out * sizeof(T)));
    T *zeros = static_cast<T *>(scratch(3, std::max(s.in, s.out) * sizeof(T)));
    std::fill_n(zeros, std::max(s.in, s.out), T(0));
    if (begin == end) std::memset(u, 0, kPoints * s.in * s.out * sizeof(T));
    for (int64_t first = begin; first < end; first += kBlock) {
      const int64_t rows = std::min<int64_t>(kBlock, end - first);
      transform_tiles<T, kTile, input_transform<T>>(x + group * s.in, s, s.groups * s.in, s.in, first,
                                                    rows, zeros, v);
      transform_tiles<T, kOut, gradient_transform<T>>(g + group * s.out, s, s.groups * s.out, s.out,
                                                      first, rows, zeros, m);
      for (int i = 0; i < kPoints; i++)
        product(m + i * rows * s.out, s.out, 1, s.out, v + i * rows * s.in, rows,
                u + i * s.in * s.out, s.in, first > begin);
    }
    T *to = parts + (slice * s.groups + group) * size;
    for (int64_t o = 0; o < s.out; o++)
      for (int64_t c = 0; c < s.in; c += lanes) {
        const T *from = u + o * s.in + c;
        both_sides<T, kTile, 3, filter_gradient<T>>(
            [&](int i, int j) { return load(from + (i * kTile + j) * s.in * s.out); },
            [&](int i, int j, Vec<T> v) { store(to + (o * 9 + i * 3 + j) * s.in + c, v); });
      }
  }
  if (slices > 1) {
    const int64_t all = s.groups * size;
    for (int64_t i = 0; i < all; i++) {
      T sum = 0;
      for (int64_t slice = 0; slice < slices; slice++) sum += parts[slice * all + i];
      gw[i] = sum;
    }
    std::free(parts);
  }
}

}  // namespace

#define ENTRY(T, name)                                                                             \
  extern "C" void winograd_convolve_##name(T *y, const T *x, const T *w, const int64_t *by, const T *x2,     \
                                  const T *w2, const int64_t *by2, const int64_t *shape,           \
                                  int turned, int threads) {                                       \
    Shape s{shape[0], shape[1], shape[2], shape[3], shape[4], shape[5]};                           \
    Factors<T> pairs[2] = {{x, w, {by[0], by[1], by[2], by[3]}}, {}};                              \
    if (x2) pairs[1] = {x2, w2, {by2[0], by2[1], by2[2], by2[3]}};                                 \
    convolve<T>(y, pairs, x2 ? 2 : 1, s, turned, threads);                                         \
  }                                                                                                \
  extern "C" void winograd_correlate_##name(T *gw, const T *x, const T *g, const int64_t *shape,            \
                                   int threads) {                                                  \
    Shape s{shape[0], shape[1], shape[2], shape[3], shape[4], shape[5]};                           \
    correlate<T>(gw, x, g, s, threads);                                                            \
  }

ENTRY(float, float)
ENTRY(double, double)
