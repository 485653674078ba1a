// The calls of token_logprobs, which looks at the targets first, and of its backward pass.
#pragma once

#include "arguments.h"

namespace ppo {
namespace {

// Returns the index of the first target that is not a class (-1 where all are), computing nothing.
// With `sums`, the logits are those of some of the classes, in a series of calls from the first to
// the last; the last one gives the results.
int64_t token_logprobs(const Tensor& logits, const Tensor& targets, double temperature,
                       double softcap, const Tensor& logprobs, const Tensor& entropy,
                       const Tensor& state, const Tensor& sums, int64_t first_class,
                       int64_t classes, int threads) {
  LogprobForward args{};
  args.logits = logit_rows(logits);
  args.count = row_count(args.logits);
  args.targets = targets.data<const int64_t>();
  args.temperature = temperature;
  args.softcap = softcap;
  args.first_class = first_class;
  args.classes = classes;
  args.sums = sums.data<RowSums>();
  args.logprobs = logprobs.data();
  args.entropy = entropy.data();
  args.state = state.data();
  args.threads = threads_for(args.count * args.logits.vocab, threads);
  for (int64_t i = 0; i < args.count; ++i) {
    const int64_t y = args.targets[i];
    if (y != -100 && (y < 0 || y >= classes)) return i;
  }
  active_isa().kernels->token_logprobs(args);
  return -1;
}

void token_logprobs_backward(const Tensor& logits, const Tensor& targets, double temperature,
                             double softcap, const Tensor& grad_logprobs,
                             const Tensor& grad_entropy, const Tensor& logprobs,
                             const Tensor& entropy, const Tensor& state, const Tensor& grad_logits,
                             int threads) {
  LogprobBackward args{};
  args.logits = logit_rows(logits);
  args.count = row_count(args.logits);
  args.targets = targets.data<const int64_t>();
  args.temperature = temperature;
  args.softcap = softcap;
  args.grad_logprobs = grad_logprobs.data();
  args.grad_entropy = grad_entropy.data();
  args.logprobs = logprobs.data();
  args.entropy = entropy.data();
  args.state = state.data();
  args.grad_logits = grad_logits.data();
  args.threads = threads_for(args.count * args.logits.vocab, threads);
  active_isa().kernels->token_logprobs_backward(args);
}

}  // namespace
}  // namespace ppo
