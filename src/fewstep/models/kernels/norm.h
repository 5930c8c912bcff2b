// What batch norm and its derivatives, with a pool and without, have in common.

#pragma once

#include "common.h"

namespace {

// Stores the moments of the vector of channels that begins with c, and returns what it stores as r:
// 1 / sqrt(var + eps).
template <class T>
INLINE Vec<T> settle(Vec<T> mu, Vec<T> v, int64_t c, T *mean, T *var, T *r, T eps) {
  Vec<T> root;
  for (int l = 0; l < Wide<T>::lanes; l++) root[l] = T(1) / std::sqrt(v[l] + eps);
  store(mean + c, mu);
  store(var + c, v);
  store(r + c, root);
  return root;
}

// What the first derivative multiplies by, for a vector of channels.
template <class T> struct Terms {
  Vec<T> a, of_d, shift;
};

// Returns them for the vector of channels that begins with c, and stores the gradients by gamma and
// beta: r sum g d and sum g, given the sums. Mean and variance are of `count` elements.
template <class T>
INLINE Terms<T> terms_of(Vec<T> sum_g, Vec<T> sum_gd, int64_t c, T *ggamma, T *gbeta,
                         const T *gamma, const T *r, int64_t count) {
  const Vec<T> root = load(r + c), a = load(gamma + c) * root, by_gamma = sum_gd * root;
  store(gbeta + c, sum_g);
  store(ggamma + c, by_gamma);
  return {a, a * root * by_gamma / T(-count), a * sum_g / T(-count)};
}

// What the second multiplies by.
template <class T> struct Factors {
  Vec<T> a, to_d, to_beta, of_d, shift, of_h;
};

// Returns them for the vector of channels that begins with c, and stores the gradient by gamma. The
// sums are of h and of h d over the `count` elements that mean and variance are of, and of g h.
template <class T>
INLINE Factors<T> factors_of(const Vec<T> sums[3], int64_t c, T *to_gamma, const T *hgamma,
                             const T *hbeta, const T *gamma, const T *r, const T *ggamma,
                             const T *gbeta, int64_t count) {
  const Vec<T> root = load(r + c), a = load(gamma + c) * root, r_n = root / T(count);
  const Vec<T> by_gamma = load(ggamma + c), by_beta = load(gbeta + c);
  const Vec<T> h0 = sums[0] / T(count), h1 = sums[1] * r_n;
  const Vec<T> to_a = sums[2] - by_beta * h0 - by_gamma * h1;
  const Vec<T> to_ggamma = load(hgamma + c) - a * h1, from = a * by_gamma;
  store(to_gamma + c, to_a * root);
  return {a, to_ggamma * root, load(hbeta + c) - a * h0,
          (to_a * a + to_ggamma * by_gamma - from * h1) * root * r_n,
          (to_ggamma * by_beta - from * h0) * r_n, from * r_n};
}

}  // namespace
