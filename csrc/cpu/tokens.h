// How a kernel reads token tensors: any dtype, any strides, padded or packed, with or without mask.
// Anonymous namespace: see ops.h.
#pragma once

#include "dtypes.h"
#include "ops.h"

namespace ppo::PPO_ISA {
namespace {

inline int64_t row_size(const Rows& rows, int64_t b) {
  return rows.cu_seqlens ? rows.cu_seqlens[b + 1] - rows.cu_seqlens[b] : rows.length;
}

// Row b of a tensor: row[t] is its token t.
template <class T>
struct Row {
  T* data;
  int64_t stride;

  T& operator[](int64_t t) const { return data[t * stride]; }
  explicit operator bool() const { return data != nullptr; }
};

template <class T>
inline Row<T> row_of(const Tokens& tensor, const Rows& rows, int64_t b) {
  if (tensor.data == nullptr) return {nullptr, 0};
  const int64_t first = rows.cu_seqlens ? rows.cu_seqlens[b] : 0;
  return {static_cast<T*>(tensor.data) + b * tensor.row_stride + first * tensor.stride,
          tensor.stride};
}

// Moments of some numbers, taken about the first of them so that a large mean cancels nothing.
struct MomentSums {
  double origin = 0, count = 0, sum = 0, sum_sq = 0;

  void add(double x) {
    if (count == 0) origin = x;
    const double d = x - origin;
    count += 1;
    sum += d;
    sum_sq += d * d;
  }
};

// Chan, Golub, LeVeque 1979: the moments of two sets together.
inline Moments merged(const Moments& a, const Moments& b) {
  if (a.count == 0) return b;
  if (b.count == 0) return a;
  const double count = a.count + b.count, delta = b.mean - a.mean;
  return {count, a.mean + delta * (b.count / count),
          a.m2 + b.m2 + delta * delta * (a.count * (b.count / count))};
}

inline Moments moments_of(const MomentSums& s) {
  if (s.count == 0) return {0, 0, 0};
  const double shift = s.sum / s.count;
  return {s.count, s.origin + shift, s.sum_sq - s.sum * shift};
}

}  // namespace
}  // namespace ppo::PPO_ISA
