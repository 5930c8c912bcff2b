// A 3x3 convolution of images with few channels, and the maximum of every 2x2 of its outputs, which
// alone are written. x is (examples, height, width, groups x channels). A maximum's place in its
// square is 0 to 3, row by row.
//
//   p  = max over k of y[k],  y[k] = b + sum_taps w[tap] x[tap + k]
//   gw[tap] = sum g x[tap + place],  gb = sum g;    picked: y[place]

#include "common.h"

namespace {

struct Shape {
  int64_t n, height, width, groups, channels, out;
  int64_t down() const { return height / 2; }
  int64_t across() const { return width / 2; }
  int64_t slices(int threads) const {  // of the images, so that every thread has a share
    return std::min<int64_t>(n, (threads + groups - 1) / groups);
  }
};

// A group's image with a border of zeros, (channels, height + 2, width + 2).
template <class T> const T *bordered(const T *x, const Shape &s, int64_t image, int64_t group) {
  const int64_t wide = s.width + 2, plane = (s.height + 2) * wide;
  T *to = scratch<T>(0, s.channels * plane);
  std::fill_n(to, s.channels * plane, T(0));
  const T *from = x + image * s.height * s.width * s.groups * s.channels + group * s.channels;
  for (int64_t i = 0; i < s.height * s.width; i++, from += s.groups * s.channels)
    for (int64_t c = 0; c < s.channels; c++)
      to[c * plane + (i / s.width + 1) * wide + i % s.width + 1] = from[c];
  return to;
}

// y[k] = b + sum w x of the four outputs of a square, whose window begins at `x`
template <class T, int channels>
INLINE void square(const T *x, int64_t wide, int64_t plane, const Vec<T> *w, Vec<T> b,
                   Vec<T> y[4]) {
  for (int k = 0; k < 4; k++) y[k] = b;
#pragma GCC unroll 3
  for (int c = 0; c < channels; c++)
#pragma GCC unroll 9
    for (int tap = 0; tap < 9; tap++)
#pragma GCC unroll 4
      for (int k = 0; k < 4; k++)
        y[k] += x[c * plane + (tap / 3 + k / 2) * wide + tap % 3 + k % 2] * w[c * 9 + tap];
}

// Calls at(slice, image, in, o) for every image of every group, `in` with a border, and for every
// vector of outputs, from o on; on all threads.
template <class T, class At> void share(const T *x, const Shape &s, int threads, At at) {
  const int64_t slices = s.slices(threads);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (int64_t item = 0; item < s.groups * slices; item++) {
    const int64_t slice = item / s.groups, group = item % s.groups;
    for (int64_t image = s.n * slice / slices; image < s.n * (slice + 1) / slices; image++) {
      const T *in = bordered(x, s, image, group);
      for (int64_t o = group * s.out; o < (group + 1) * s.out; o += Wide<T>::lanes)
        at(slice, image, in, o);
    }
  }
}

// Filters (groups x out, channels, 3, 3) of `lanes` of a group's outputs, as vectors.
template <class T, int channels> void vectors(const T *w, Vec<T> to[channels * 9]) {
  for (int i = 0; i < channels * 9; i++)
    for (int l = 0; l < Wide<T>::lanes; l++)
      reinterpret_cast<T *>(to + i)[l] = w[l * channels * 9 + i];
}

template <class T, int channels, bool picks>
void convolve(T *p, uint8_t *where, const T *x, const T *w, const T *b, const Shape &s,
              int threads) {
  const int64_t wide = s.width + 2, plane = (s.height + 2) * wide, all = s.groups * s.out;
  share(x, s, threads, [&](int64_t, int64_t image, const T *in, int64_t o) {
    Vec<T> filter[channels * 9], y[4];
    vectors<T, channels>(w + o * channels * 9, filter);
    const Vec<T> shift = load(b + o);
    for (int64_t i = 0; i < s.down() * s.across(); i++) {
      square<T, channels>(in + i / s.across() * 2 * wide + i % s.across() * 2, wide, plane, filter,
                          shift, y);
      const int64_t to = (image * s.down() * s.across() + i) * all + o;
      typename Place<T>::type place = {};
      Vec<T> found = y[0];
      if (picks) {
        place = Place<T>::read(where + to);
        for (int k = 1; k < 4; k++) found = place == k ? y[k] : found;
      } else {
        for (int k = 1; k < 4; k++) {
          auto higher = (y[k] > found) | (y[k] != y[k]);  // a NaN is kept
          found = higher ? y[k] : found;
          place = higher ? place * 0 + k : place;
        }
        Place<T>::write(where + to, place);
      }
      store(p + to, found);
    }
  });
}

template <class T, int channels>
void correlate(T *gw, T *gb, const T *x, const T *g, const uint8_t *where, const Shape &s,
               int threads) {
  constexpr int lanes = Wide<T>::lanes, taps = channels * 9;
  const int64_t wide = s.width + 2, plane = (s.height + 2) * wide;
  const int64_t slices = s.slices(threads), all = s.groups * s.out, size = all * (taps + 1);
  T *parts = allocate<T>(slices * size);
  std::fill_n(parts, slices * size, T(0));
  share(x, s, threads, [&](int64_t slice, int64_t image, const T *in, int64_t o) {
    Vec<T> sum[taps] = {}, total = {};
    for (int64_t row = 0; row < s.down(); row++) {  // many terms in one sum lose digits
      Vec<T> of_row[taps] = {}, total_of_row = {};
      for (int64_t column = 0; column < s.across(); column++) {
        const T *window = in + row * 2 * wide + column * 2;
        const int64_t at = ((image * s.down() + row) * s.across() + column) * all + o;
        const Vec<T> value = load(g + at);
        const auto place = Place<T>::read(where + at);
        total_of_row += value;
        Vec<T> only[4];
        for (int k = 0; k < 4; k++) only[k] = place == k ? value : Vec<T>{};
#pragma GCC unroll 3
        for (int c = 0; c < channels; c++)
#pragma GCC unroll 9
          for (int tap = 0; tap < 9; tap++)
#pragma GCC unroll 4
            for (int k = 0; k < 4; k++)
              of_row[c * 9 + tap] +=
                  window[c * plane + (tap / 3 + k / 2) * wide + tap % 3 + k % 2] * only[k];
      }
      for (int i = 0; i < taps; i++) sum[i] += of_row[i];
      total += total_of_row;
    }
    T *part = parts + slice * size + o * (taps + 1);
    for (int l = 0; l < lanes; l++, part += taps + 1) {
      for (int i = 0; i < taps; i++) part[i] += sum[i][l];
      part[taps] += total[l];
    }
  });
  for (int64_t slice = 1; slice < slices; slice++)
    for (int64_t i = 0; i < size; i++) parts[i] += parts[slice * size + i];
  for (int64_t o = 0; o < all; o++) {
    std::copy_n(parts + o * (taps + 1), taps, gw + o * taps);
    gb[o] = parts[o * (taps + 1) + taps];
  }
  std::free(parts);
}

template <class T, bool picks>
void convolve(T *p, uint8_t *where, const T *x, const T *w, const T *b, const int64_t *shape,
              int threads) {
  const Shape s{shape[0], shape[1], shape[2], shape[3], shape[4], shape[5]};
  switch (s.channels) {
  case 1: return convolve<T, 1, picks>(p, where, x, w, b, s, threads);
  case 2: return convolve<T, 2, picks>(p, where, x, w, b, s, threads);
  case 3: return convolve<T, 3, picks>(p, where, x, w, b, s, threads);
  }
}

template <class T>
void correlate(T *gw, T *gb, const T *x, const T *g, const uint8_t *where, const int64_t *shape,
               int threads) {
  const Shape s{shape[0], shape[1], shape[2], shape[3], shape[4], shape[5]};
  switch (s.channels) {
  case 1: return correlate<T, 1>(gw, gb, x, g, where, s, threads);
  case 2: return correlate<T, 2>(gw, gb, x, g, where, s, threads);
  case 3: return correlate<T, 3>(gw, gb, x, g, where, s, threads);
  }
}

}  // namespace

#define ENTRY(T, name)                                                                             \
  extern "C" void pooled_convolve_##name(T *p, uint8_t *where, const T *x, const T *w, const T *b, \
                                         const int64_t *shape, int threads) {                      \
    convolve<T, false>(p, where, x, w, b, shape, threads);                                         \
  }                                                                                                \
  extern "C" void pooled_convolve_at_##name(T *p, uint8_t *where, const T *x, const T *w,          \
                                            const T *b, const int64_t *shape, int threads) {       \
    convolve<T, true>(p, where, x, w, b, shape, threads);                                          \
  }                                                                                                \
  extern "C" void pooled_correlate_##name(T *gw, T *gb, const T *x, const T *g,                    \
                                          const uint8_t *where, const int64_t *shape,              \
                                          int threads) {                                           \
    correlate<T>(gw, gb, x, g, where, shape, threads);                                             \
  }

ENTRY(float, float)
ENTRY(double, double)
