// The transforms of Winograd's F(4x4, 3x3), of vectors of channels, along one side and both.
//
// The points are 0, +-3/4, +-3/2 and infinity: every coefficient of A and B is a short binary
// fraction, and in float32 the error is half of that of the usual 0, +-1, +-2.

#pragma once

#include "common.h"

namespace {

constexpr int kTile = 6, kOut = 4, kPoints = kTile * kTile;

// The points a and b, their squares' product and sum, and for 0, +-a and +-b one over the product
// of the distances from the others.
template <class T> constexpr T a1 = 0.75;
template <class T> constexpr T b1 = 1.5;
template <class T> constexpr T a2 = 0.5625;
template <class T> constexpr T b2 = 2.25;
template <class T> constexpr T a2b2 = 1.265625;
template <class T> constexpr T a2_b2 = 2.8125;
template <class T> constexpr T n0 = T(1 / 1.265625);
template <class T> constexpr T na = T(-1 / 1.8984375);
template <class T> constexpr T nb = T(1 / 7.59375);

// t = B^T d
template <class T> INLINE void input_transform(const Vec<T> d[6], Vec<T> t[6]) {
  Vec<T> e = d[4] - b2<T> * d[2], o = a1<T> * (d[3] - b2<T> * d[1]);
  Vec<T> f = d[4] - a2<T> * d[2], p = b1<T> * (d[3] - a2<T> * d[1]);
  t[0] = a2b2<T> * d[0] - a2_b2<T> * d[2] + d[4];
  t[1] = e + o;
  t[2] = e - o;
  t[3] = f + p;
  t[4] = f - p;
  t[5] = a2b2<T> * d[1] - a2_b2<T> * d[3] + d[5];
}

// y = A^T m
template <class T> INLINE void output_transform(const Vec<T> m[6], Vec<T> y[4]) {
  Vec<T> e = m[1] + m[2], o = a1<T> * (m[1] - m[2]);
  Vec<T> f = m[3] + m[4], p = b1<T> * (m[3] - m[4]);
  y[0] = m[0] + e + f;
  y[1] = o + p;
  y[2] = a2<T> * e + b2<T> * f;
  y[3] = a2<T> * o + b2<T> * p + m[5];
}

// m = A g
template <class T> INLINE void gradient_transform(const Vec<T> g[4], Vec<T> m[6]) {
  Vec<T> e = g[0] + a2<T> * g[2], o = a1<T> * (g[1] + a2<T> * g[3]);
  Vec<T> f = g[0] + b2<T> * g[2], p = b1<T> * (g[1] + b2<T> * g[3]);
  m[0] = g[0];
  m[1] = e + o;
  m[2] = e - o;
  m[3] = f + p;
  m[4] = f - p;
  m[5] = g[3];
}

// u = G w
template <class T> INLINE void filter_transform(const Vec<T> w[3], Vec<T> u[6]) {
  Vec<T> e = na<T> * (w[0] + a2<T> * w[2]), o = (na<T> * a1<T>) * w[1];
  Vec<T> f = nb<T> * (w[0] + b2<T> * w[2]), p = (nb<T> * b1<T>) * w[1];
  u[0] = n0<T> * w[0];
  u[1] = e + o;
  u[2] = e - o;
  u[3] = f + p;
  u[4] = f - p;
  u[5] = w[2];
}

// w = G^T u
template <class T> INLINE void filter_gradient(const Vec<T> u[6], Vec<T> w[3]) {
  Vec<T> e = na<T> * (u[1] + u[2]), o = (na<T> * a1<T>) * (u[1] - u[2]);
  Vec<T> f = nb<T> * (u[3] + u[4]), p = (nb<T> * b1<T>) * (u[3] - u[4]);
  w[0] = n0<T> * u[0] + e + f;
  w[1] = o + p;
  w[2] = a2<T> * e + b2<T> * f + u[5];
}

// out = F in F^T: `from` gives the n x n vectors of in, `to` takes the m x m of out
template <class T, int n, int m, void (*F)(const Vec<T> *, Vec<T> *), class From, class To>
INLINE void both_sides(From from, To to) {
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

}  // namespace
