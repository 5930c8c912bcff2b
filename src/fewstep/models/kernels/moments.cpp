// The first and second moments of the 3x3 patches of images with few channels, zeros around them. x is
// (examples, height, width, groups x channels); for each group, with n pixels in all,
//
//   m[c i j] = sum_p x[c, p + (i, j)] / n
//   S[c i j, c' i' j'] = sum_p x[c, p + (i, j)] x[c', p + (i', j')] / n
//
// With q = p + (i, j), the factors are x[c, q] and x[c', q + one of 25 offsets], and i and j only say
// which q there are: none in the last row where i is 0, none in the first where i is 2, and so for
// columns. So products are summed for each offset, over nine parts of the image: rows and columns
// that are the first, the last, or between them.

#include "common.h"

namespace {

constexpr int kOffsets = 5, kParts = 3;  // one way; parts are the first, the middle and the last

struct Shape {
  int64_t n, height, width, groups, channels;
  int64_t slices(int threads) const {  // of the images, so that every thread has a share
    return std::min<int64_t>(n, (threads + groups - 1) / groups);
  }
  int64_t across() const { return (width + 7) / 8 * 8; }  // whole vectors
  int64_t wide() const { return across() + kOffsets - 1; }
};

// Sums of x[c] and of x[c] x[c'], for each offset, over the nine parts; of each lane for itself.
template <int channels, int lanes> struct Sums {
  double x[kParts][kParts][channels][lanes];
  double xx[kParts][kParts][channels][kOffsets][channels][kOffsets][lanes];
};
constexpr int kLanes = Wide<double>::lanes;

INLINE void add(double *to, Vec<double> value) { store(to, load(to) + value); }

// A group's image with a border of two zeros, (channels, height + 4, wide).
template <class T> const double *bordered(const T *x, const Shape &s, int64_t image, int64_t group) {
  const int64_t plane = (s.height + kOffsets - 1) * s.wide(), all = s.groups * s.channels;
  double *to = scratch<double>(0, s.channels * plane);
  std::fill_n(to, s.channels * plane, 0.0);
  const T *from = x + image * s.height * s.width * all + group * s.channels;
  for (int64_t y = 0; y < s.height; y++)
    for (int64_t i = 0; i < s.width; i++, from += all)
      for (int64_t c = 0; c < s.channels; c++)
        to[c * plane + (y + 2) * s.wide() + i + 2] = from[c];
  return to;
}

// Adds an image's rows: what is between their ends, by vectors, and these.
template <int channels>
void add(const double *image, const Shape &s, Sums<channels, kLanes> &middles,
         Sums<channels, 1> &ends) {
  const int64_t plane = (s.height + kOffsets - 1) * s.wide();
  double *middle = scratch<double>(1, s.across());
  std::fill_n(middle, s.across(), 0.0);
  for (int64_t y = 0; y < s.height; y++) {
    const int part = y == 0 ? 0 : y == s.height - 1 ? 2 : 1;
    for (int c = 0; c < channels; c++) {
      const double *row = image + c * plane + (y + 2) * s.wide() + 2;
      std::copy_n(row + 1, s.width - 2, middle + 1);
      for (int64_t i = 0; i < s.across(); i += kLanes)
        add(middles.x[part][1][c], load(middle + i));
      for (int end : {0, 2}) *ends.x[part][end][c] += row[end ? s.width - 1 : 0];
      for (int down = 0; down < kOffsets; down++) {
        const double *other = image + (y + down) * s.wide();
        Vec<double> sum[channels][kOffsets] = {};
        for (int64_t i = 0; i < s.across(); i += kLanes) {
          const Vec<double> value = load(middle + i);
          for (int d = 0; d < channels; d++)
            for (int k = 0; k < kOffsets; k++) sum[d][k] += value * load(other + d * plane + i + k);
        }
        for (int d = 0; d < channels; d++)
          for (int k = 0; k < kOffsets; k++) {
            add(middles.xx[part][1][c][down][d][k], sum[d][k]);
            for (int end : {0, 2}) {
              const int64_t i = end ? s.width - 1 : 0;
              *ends.xx[part][end][c][down][d][k] += row[i] * other[d * plane + i + k];
            }
          }
      }
    }
  }
}

template <class T, int channels>
void moments(double *m, double *second, const T *x, const Shape &s, int threads) {
  using Found = Sums<channels, 1>;
  constexpr int64_t numbers = sizeof(Found) / sizeof(double), taps = channels * 9;
  const int64_t slices = s.slices(threads);
  Found *parts = allocate<Found>(s.groups * slices);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (int64_t item = 0; item < s.groups * slices; item++) {
    const int64_t group = item / slices, slice = item % slices;
    Sums<channels, kLanes> middles = {};
    Found ends = {};
    for (int64_t image = s.n * slice / slices; image < s.n * (slice + 1) / slices; image++)
      add<channels>(bordered(x, s, image, group), s, middles, ends);
    const double *of_middles = reinterpret_cast<const double *>(&middles);
    double *sums = reinterpret_cast<double *>(&ends);
    for (int64_t i = 0; i < numbers * kLanes; i++) sums[i / kLanes] += of_middles[i];
    parts[item] = ends;
  }
  const double count = s.n * s.height * s.width;
  const auto first = [](int tap) { return tap == 2 ? 1 : 0; };  // of the parts that a tap has
  const auto last = [](int tap) { return tap == 0 ? 1 : 2; };
  for (int64_t group = 0; group < s.groups; group++, m += taps, second += taps * taps)
    for (int64_t a = 0; a < taps; a++) {
      const int c = a / 9, i = a / 3 % 3, j = a % 3;
      m[a] = 0;
      std::fill_n(second + a * taps, taps, 0.0);
      for (int64_t slice = 0; slice < slices; slice++)
        for (int row = first(i); row <= last(i); row++)
          for (int column = first(j); column <= last(j); column++) {
            const Found &found = parts[group * slices + slice];
            m[a] += *found.x[row][column][c] / count;
            for (int64_t b = 0; b < taps; b++)
              second[a * taps + b] +=
                  *found.xx[row][column][c][b / 3 % 3 - i + 2][b / 9][b % 3 - j + 2] / count;
          }
    }
  std::free(parts);
}

template <class T>
void moments(double *m, double *second, const T *x, const int64_t *shape, int threads) {
  const Shape s{shape[0], shape[1], shape[2], shape[3], shape[4]};
  switch (s.channels) {
  case 1: return moments<T, 1>(m, second, x, s, threads);
  case 2: return moments<T, 2>(m, second, x, s, threads);
  case 3: return moments<T, 3>(m, second, x, s, threads);
  }
}

}  // namespace

#define ENTRY(T, name)                                                                             \
  extern "C" void moments_##name(double *m, double *second, const T *x, const int64_t *shape,  \
                                 int threads) {                                                    \
    moments<T>(m, second, x, shape, threads);                                                  \
  }

ENTRY(float, float)
ENTRY(double, double)
