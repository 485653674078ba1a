// The call of sample, with room for the lists that top_k and top_p need.
#pragma once

#include <algorithm>
#include <memory>

#include "arguments.h"

namespace ppo {
namespace {

// `offsets` [N] are int64 and contiguous; without them row i has counter offset + i.
void sample(const Tensor& logits, double temperature, int64_t top_k, double top_p, int64_t seed,
            int64_t offset, const Tensor& offsets, const Tensor& tokens, const Tensor& logprobs,
            int threads) {
  SampleArgs args{};
  args.logits = logit_rows(logits);
  args.count = row_count(args.logits);
  args.temperature = temperature;
  args.top_k = top_k < args.logits.vocab ? top_k : 0;
  args.top_p = top_p;
  args.seed = uint64_t(seed);
  args.offset = offset;
  args.offsets = offsets ? offsets.data<const int64_t>() : nullptr;
  args.tokens = tokens.data<int64_t>();
  args.logprobs = logprobs.data();
  args.threads = threads_for(args.count * args.logits.vocab, threads);
  args.tasks = args.count;
  std::unique_ptr<char[]> lists;
  if (args.top_k > 0 || args.top_p < 1) {
    args.tasks = std::min<int64_t>(args.count, args.threads);
    const int64_t width = args.logits.dtype == DType::f64 ? sizeof(double) : sizeof(float);
    lists.reset(new char[size_t(2 * args.tasks * (args.logits.vocab + kListRoom) * width)]);
    args.lists = lists.get();
  }
  active_isa().kernels->sample(args);
}

}  // namespace
}  // namespace ppo
