// 3x3 convolutions of stride 1 and padding 1 by Winograd's F(4x4, 3x3), each group of channels with
// filters of its own, images channels-last, a multiple of 16 channels in a group.
//
//   y  = A^T [ (G w G^T) . (B^T x B) ] A        over tiles of 4x4 outputs and 6x6 inputs
//   gw = G^T [ (B^T x B) . (A g A^T) ] G
//
// "." sums over channels (y) or over tiles (gw), as 36 products of matrices.

#include "transforms.h"

namespace {

constexpr int kBlock = 30;  // tiles at once: their transforms stay in the second-level cache

// A product keeps kRows x kColumns vectors of sums in registers.
constexpr int kRows = 6, kColumns = kRegisters == 32 ? 4 : 2;

// c[i][j] (+)= sum_k a[i * row + k * column] b[k][j] for R rows and C vectors
template <class T, int R, int C>
INLINE void panel(const T *a, int64_t row, int64_t column, const T *b, int64_t wide, int64_t depth,
                  T *c, int64_t c_wide, bool add) {
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

// Tiles first..first+count of a group's outputs, from m[point][tile][channel].
template <class T>
void write_tiles(const T *m, const Shape &s, int64_t group, int64_t first, int64_t count, T *y) {
  const int64_t pixel = s.groups * s.out, line = s.width * pixel;
  for (int64_t t = 0; t < count; t++) {
    const Corner at(first + t, s);
    T *corner = y + (at.image * s.height + at.y) * line + at.x * pixel + group * s.out;
    const int high = std::min<int64_t>(kOut, s.height - at.y);
    const int wide = std::min<int64_t>(kOut, s.width - at.x);
    for (int64_t c = 0; c < s.out; c += Wide<T>::lanes) {
      const T *from = m + t * s.out + c;
      T *to = corner + c;
      const auto in = [&](int i, int j) { return load(from + (i * kTile + j) * count * s.out); };
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

// What a thread works on and with: a slice of the tiles of a group, and its memory.
template <class T> struct Share {
  int64_t group, slice, begin, end;
  T *u, *v, *m, *zeros;
  Share(int64_t item, int64_t slices, const Shape &s, int filters)
      : group(item / slices), slice(item % slices), begin(s.tiles() * slice / slices),
        end(s.tiles() * (slice + 1) / slices),
        u(scratch<T>(0, filters * kPoints * s.in * s.out)),
        v(scratch<T>(1, kPoints * kBlock * s.in)), m(scratch<T>(2, kPoints * kBlock * s.out)),
        zeros(scratch<T>(3, std::max(s.in, s.out))) {
    std::fill_n(zeros, std::max(s.in, s.out), T(0));
  }
};

int64_t slices_of(const Shape &s, int threads) { return (threads + s.groups - 1) / s.groups; }

template <class T> struct Factors {
  const T *x, *w;
  Strides by;
};

// y = sum of conv(x, w) over the pairs
template <class T>
void convolve(T *y, const Factors<T> *pairs, int count, const Shape &s, bool turned, int threads) {
  const int64_t slices = slices_of(s, threads), filters = kPoints * s.in * s.out;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (int64_t item = 0; item < s.groups * slices; item++) {
    const Share<T> own(item, slices, s, count);
    for (int p = 0; p < count; p++) {
      const Strides &by = pairs[p].by;
      const T *w = pairs[p].w + own.group * (turned ? s.in : s.out) * by.out;
      transform_filters(w, by, s.in, s.out, turned, own.u + p * filters);
    }
    for (int64_t first = own.begin; first < own.end; first += kBlock) {
      const int64_t rows = std::min<int64_t>(kBlock, own.end - first);
      for (int p = 0; p < count; p++) {
        transform_tiles<T, kTile, input_transform<T>>(pairs[p].x + own.group * s.in, s,
                                                      s.groups * s.in, s.in, first, rows,
                                                      own.zeros, own.v);
        for (int i = 0; i < kPoints; i++)
          product(own.v + i * rows * s.in, rows, s.in, 1, own.u + p * filters + i * s.in * s.out,
                  s.in, own.m + i * rows * s.out, s.out, p > 0);
      }
      write_tiles(own.m, s, own.group, first, rows, y);
    }
  }
}

// gw (groups x out, 3, 3, in) = sum over images
template <class T> void correlate(T *gw, const T *x, const T *g, const Shape &s, int threads) {
  const int64_t slices = slices_of(s, threads), size = s.out * 9 * s.in, all = s.groups * size;
  T *parts = slices == 1 ? gw : allocate<T>(slices * all);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (int64_t item = 0; item < s.groups * slices; item++) {
    const Share<T> own(item, slices, s, 1);
    std::fill_n(own.u, own.begin == own.end ? kPoints * s.in * s.out : 0, T(0));
    for (int64_t first = own.begin; first < own.end; first += kBlock) {
      const int64_t rows = std::min<int64_t>(kBlock, own.end - first);
      transform_tiles<T, kTile, input_transform<T>>(x + own.group * s.in, s, s.groups * s.in, s.in,
                                                    first, rows, own.zeros, own.v);
      transform_tiles<T, kOut, gradient_transform<T>>(g + own.group * s.out, s, s.groups * s.out,
                                                      s.out, first, rows, own.zeros, own.m);
      for (int i = 0; i < kPoints; i++)
        product(own.m + i * rows * s.out, s.out, 1, s.out, own.v + i * rows * s.in, rows,
                own.u + i * s.in * s.out, s.in, first > own.begin);
    }
    T *part = parts + own.slice * all + own.group * size;
    for (int64_t o = 0; o < s.out; o++)
      for (int64_t c = 0; c < s.in; c += Wide<T>::lanes) {
        const T *from = own.u + o * s.in + c;
        T *to = part + o * 9 * s.in + c;
        both_sides<T, kTile, 3, filter_gradient<T>>(
            [&](int i, int j) { return load(from + (i * kTile + j) * s.in * s.out); },
            [&](int i, int j, Vec<T> v) { store(to + (i * 3 + j) * s.in, v); });
      }
  }
  if (slices == 1) return;
  std::copy_n(parts, all, gw);
  for (int64_t slice = 1; slice < slices; slice++)
    for (int64_t i = 0; i < all; i++) gw[i] += parts[slice * all + i];
  std::free(parts);
}

}  // namespace

#define ENTRY(T, name)                                                                             \
  extern "C" void winograd_convolve_##name(T *y, const T *x, const T *w, const int64_t *by,        \
                                           const T *x2, const T *w2, const int64_t *by2,           \
                                           const int64_t *shape, int turned, int threads) {        \
    const Shape s{shape[0], shape[1], shape[2], shape[3], shape[4], shape[5]};                     \
    Factors<T> pairs[2] = {{x, w, {by[0], by[1], by[2], by[3]}}, {}};                              \
    if (x2) pairs[1] = {x2, w2, {by2[0], by2[1], by2[2], by2[3]}};                                 \
    convolve<T>(y, pairs, x2 ? 2 : 1, s, turned, threads);                                         \
  }                                                                                                \
  extern "C" void winograd_correlate_##name(T *gw, const T *x, const T *g, const int64_t *shape,   \
                                            int threads) {                                         \
    const Shape s{shape[0], shape[1], shape[2], shape[3], shape[4], shape[5]};                     \
    correlate<T>(gw, x, g, s, threads);                                                            \
  }

ENTRY(float, float)
ENTRY(double, double)
