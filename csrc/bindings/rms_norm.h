// The calls of rms_norm and of its backward pass.
#pragma once

#include <memory>

#include "arguments.h"

namespace ppo {
namespace {

// Arguments of both passes, but for what is written.
RmsNorm rms_norm_args(const Tensor& x, const Tensor& weight, double eps, double added,
                      int threads) {
  RmsNorm args{};
  args.x = logit_rows(x);
  args.count = row_count(args.x);
  args.weight = weight.data();
  args.weight_dtype = weight.dtype();
  args.eps = eps;
  args.added = added;
  args.threads = threads_for(args.count * args.x.vocab, threads);
  return args;
}

void rms_norm(const Tensor& x, const Tensor& weight, double eps, double added, const Tensor& y,
              int threads) {
  RmsNorm args = rms_norm_args(x, weight, eps, added, threads);
  args.y = y.data();
  args.y_dtype = y.dtype();
  if (args.count * args.x.vocab == 0) return;
  const std::unique_ptr<double[]> scratch(new double[size_t(args.x.vocab)]);
  args.scratch = scratch.get();
  active_isa().kernels->rms_norm(args);
}

void rms_norm_backward(const Tensor& grad_y, const Tensor& x, const Tensor& weight, double eps,
                       double added, const Tensor& grad_x, const Tensor& grad_weight,
                       int threads) {
  RmsNorm args = rms_norm_args(x, weight, eps, added, threads);
  args.grad_y = logit_rows(grad_y);
  args.grad_x = grad_x.data();
  args.grad_weight = grad_weight.data();
  const int64_t parts = grad_weight ? (args.count + kNormRows - 1) / kNormRows : 0;
  const size_t size = args.x.dtype == DType::f64 ? sizeof(double) : sizeof(float);
  const std::unique_ptr<char[]> scratch(new char[size_t((1 + parts) * args.x.vocab) * size]);
  args.scratch = scratch.get();
  active_isa().kernels->rms_norm_backward(args);
}

}  // namespace
}  // namespace ppo
