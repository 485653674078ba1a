// The calls that pack a weight and multiply by it.
#pragma once

#include <memory>

#include "arguments.h"

namespace ppo {
namespace {

// Whether this CPU, and the instruction set in use, multiply bfloat16 themselves.
bool multiplies_bf16() {
#if defined(__x86_64__)
  return active_isa().name == "avx512" && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

void pack_weight(const Tensor& part, int64_t first, int64_t last, const Tensor& panels,
                 int threads) {
  PackWeight args{};
  args.from_dtype = part.dtype();
  args.dtype = panels.dtype();
  args.from = part.data();
  args.count = part.size(0);
  args.in = part.size(1);
  args.out_stride = part.stride(0);
  args.in_stride = part.stride(1);
  args.first = first;
  args.last = last;
  args.panels = panels.data();
  args.threads = threads_for(args.count * args.in, threads);
  active_isa().kernels->pack_weight(args);
}

void packed_linear(const Tensor& x, const Tensor& panels, const Tensor& bias, const Tensor& out,
                   int threads) {
  PackedLinear args{};
  args.x_dtype = x.dtype();
  args.dtype = panels.dtype();
  args.out_dtype = out.dtype();
  // Of any dimensions, contiguous where these are not two.
  const int last = x.dims() - 1;
  args.rows = row_count(logit_rows(x));
  args.in = x.size(last);
  args.outs = out.size(last);
  args.x = x.data();
  args.row_stride = last == 1 ? x.stride(0) : args.in;
  args.panels = panels.data();
  args.bias = bias ? bias.data<const float>() : nullptr;
  args.out = out.data();
  const std::unique_ptr<float[]> tiles(new float[size_t(args.rows * (args.in + 1))]);
  args.tiles = tiles.get();
  args.threads = threads_for(args.outs * args.in, threads);
  active_isa().kernels->packed_linear(args);
}

}  // namespace
}  // namespace ppo
