// Where rows begin whose leading dimensions may have any strides. Anonymous namespace: see ops.h.
#pragma once

#include "dtypes.h"

namespace ppo::PPO_ISA {
namespace {

template <class T>
T* logits_row(const LogitRows& logits, int64_t i) {
  int64_t offset = 0;
  for (int d = logits.dims - 1; d >= 0; --d) {
    offset += (i % logits.shape[d]) * logits.strides[d];
    i /= logits.shape[d];
  }
  return static_cast<T*>(logits.data) + offset;
}

}  // namespace
}  // namespace ppo::PPO_ISA
