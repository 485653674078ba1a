// The calls of swiglu and of its backward pass.
#pragma once

#include "arguments.h"

namespace ppo {
namespace {

// `x` as the rows of swiglu: one, where all tensors are contiguous.
LogitRows swiglu_rows(const Tensor& x, bool one_row, int64_t numbers) {
  if (one_row) return {x.data(), x.dtype(), numbers, 0, nullptr, nullptr};
  return logit_rows(x);
}

// Arguments of both passes, but for what is written. grad_y is absent of a forward pass.
SwiGLU swiglu_args(const Tensor& gate, const Tensor& up, const Tensor& grad_y, int threads) {
  SwiGLU args{};
  const int64_t numbers = gate.count();
  const bool one_row = gate.is_contiguous() && up.is_contiguous() &&
                       (!grad_y || grad_y.is_contiguous());
  args.gate = swiglu_rows(gate, one_row, numbers);
  args.up = swiglu_rows(up, one_row, numbers);
  if (grad_y) args.grad_y = swiglu_rows(grad_y, one_row, numbers);
  args.count = row_count(args.gate);
  args.threads = threads_for(numbers, threads);
  return args;
}

void swiglu(const Tensor& gate, const Tensor& up, const Tensor& y, int threads) {
  common_dtype({&gate, &up, &y});
  SwiGLU args = swiglu_args(gate, up, Tensor(), threads);
  args.y = y.data();
  active_isa().kernels->swiglu(args);
}

void swiglu_backward(const Tensor& grad_y, const Tensor& gate, const Tensor& up,
                     const Tensor& grad_gate, const Tensor& grad_up, int threads) {
  common_dtype({&grad_y, &gate, &up, &grad_gate, &grad_up});
  SwiGLU args = swiglu_args(gate, up, grad_y, threads);
  args.grad_gate = grad_gate.data();
  args.grad_up = grad_up.data();
  active_isa().kernels->swiglu_backward(args);
}

}  // namespace
}  // namespace ppo
