// Vectors of float and double, places of maxima, and memory that a thread keeps.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>

#define INLINE inline __attribute__((always_inline))

namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64, kRegisters = 32;
#else
constexpr int kBytes = 32, kRegisters = 16;
#endif

template <class T> struct Wide {
  static constexpr int lanes = kBytes / sizeof(T);
  typedef T type __attribute__((vector_size(kBytes), aligned(sizeof(T)), may_alias));
};
template <class T> using Vec = typename Wide<T>::type;

template <class T> inline Vec<T> load(const T *p) { return *reinterpret_cast<const Vec<T> *>(p); }
template <class T> inline void store(T *p, Vec<T> v) { *reinterpret_cast<Vec<T> *>(p) = v; }

// A gradient by z = act(...) as it goes on to what was activated.
template <class V, class T> INLINE V through(V g, V z, T slope) { return z > 0 ? g : g * slope; }

// Places in their squares, a byte each, and as wide as a T for comparisons.
template <class T> struct Place {
  typedef uint8_t bytes __attribute__((vector_size(Wide<T>::lanes), aligned(1), may_alias));
  typedef decltype(Vec<T>{} > Vec<T>{}) type;
  static type read(const uint8_t *p) {
    return __builtin_convertvector(*reinterpret_cast<const bytes *>(p), type);
  }
  static void write(uint8_t *p, type place) {
    *reinterpret_cast<bytes *>(p) = __builtin_convertvector(place, bytes);
  }
};

constexpr int kMost = 16;  // vectors of channels that a thread has at once

// Calls at(first, last) for blocks of neighbouring channels, shared evenly among the threads. The
// vectors of a block lie side by side, where one of them in all pixels is spread over memory.
template <class T, class At> void each_block(int64_t channels, int threads, At at) {
  const auto up = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const int64_t lanes = Wide<T>::lanes, vectors = channels / lanes;
  const int64_t rounds = up(up(vectors, threads), kMost);
  const int64_t block = lanes * up(vectors, threads * rounds);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t c = 0; c < channels; c += block) at(c, std::min(c + block, channels));
}

template <class T> T *allocate(int64_t count) {
  void *at = std::aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64);
  if (!at) std::abort();
  return static_cast<T *>(at);
}

// Memory that a thread keeps, for each `which` of its own.
template <class T> T *scratch(int which, int64_t count) {
  struct Held {
    T *at = nullptr;
    int64_t count = 0;
    ~Held() { std::free(at); }
  };
  static thread_local Held held[4];
  Held &mine = held[which];
  if (mine.count < count) {
    std::free(mine.at);
    mine.at = allocate<T>(count);
    mine.count = count;
  }
  return mine.at;
}

}  // namespace
