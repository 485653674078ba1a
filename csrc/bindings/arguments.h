// What several ops ask of their tensors. Like the ops' own, this header is for bindings.cpp alone.
#pragma once

#include <initializer_list>
#include <stdexcept>
#include <string>

#include "../cpu/isa.h"
#include "../cpu/ops.h"
#include "../tensor.h"

namespace ppo {
namespace {

// Tokens without boundaries, [N] alone, are one row.
Rows rows(const Tensor& like, const Tensor& cu_seqlens) {
  if (!cu_seqlens) {
    return like.dims() == 2 ? Rows{like.size(0), like.size(1), nullptr}
                            : Rows{1, like.size(0), nullptr};
  }
  const Rows rows{cu_seqlens.size(0) - 1, like.size(0), cu_seqlens.data<const int64_t>()};
  const int64_t* cu = rows.cu_seqlens;
  bool valid = rows.count >= 0 && cu[0] == 0 && cu[rows.count] == rows.length;
  for (int64_t b = 0; valid && b < rows.count; ++b) valid = cu[b] <= cu[b + 1];
  if (!valid) {
    throw std::invalid_argument("cu_seqlens must start with 0, never fall and end with the number "
                                "of tokens, " + std::to_string(rows.length));
  }
  return rows;
}

// The one dtype of all inputs; the kernels would read past the end of a narrower one.
DType common_dtype(std::initializer_list<const Tensor*> inputs) {
  const DType dtype = (*inputs.begin())->dtype();
  for (const Tensor* x : inputs) {
    if (*x && x->dtype() != dtype) throw std::invalid_argument("inputs of several dtypes");
  }
  return dtype;
}

int64_t token_count(const Rows& rows) {
  return rows.cu_seqlens ? rows.length : rows.count * rows.length;
}

// Waking a thread takes as long as this many elements of simple work.
int threads_for(int64_t elements, int threads) {
  constexpr int64_t worth_waking = 16384;
  return elements < worth_waking ? 1 : threads;
}

// `numbers` to a small contiguous output in the accumulation dtype.
void store_numbers(const double* numbers, int64_t count, DType dtype, const Tensor& to) {
  for (int64_t i = 0; i < count; ++i) {
    if (dtype == DType::f64) {
      to.data<double>()[i] = numbers[i];
    } else {
      to.data<float>()[i] = float(numbers[i]);
    }
  }
}

LogitRows logit_rows(const Tensor& logits) {
  return {logits.data(), logits.dtype(), logits.size(logits.dims() - 1), logits.dims() - 1,
          logits.shape(), logits.strides()};
}

int64_t row_count(const LogitRows& logits) {
  int64_t count = 1;
  for (int d = 0; d < logits.dims; ++d) count *= logits.shape[d];
  return count;
}

Heads heads(const Tensor& x) {
  return {x.data(), x.stride(0), x.stride(1), x.dims() == 4 ? x.stride(2) : 0};
}

}  // namespace
}  // namespace ppo
