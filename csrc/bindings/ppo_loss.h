// The calls of the policy loss and the value loss.
#pragma once

#include <tuple>
#include <vector>

#include "arguments.h"
#include "losses.h"

namespace ppo {
namespace {

using Whitening = std::tuple<double, double>;      // A becomes (A - mean) * scale
using Clips = std::tuple<double, double, double>;  // low, high, dual clip

void ppo_policy_loss(const Tensor& mask, const Tensor& cu_seqlens, const Tensor& logprobs,
                     const Tensor& old_logprobs, const Tensor& advantages,
                     const Whitening& whitening, const Tensor& is_weights, const Clips& clips,
                     const Tensor& entropy, double entropy_coef, const Tensor& ref_logprobs,
                     double kl_coef, int kl_estimator, int objective, int ratio_level,
                     const Reducing& reducing, const Tensor& loss, const Tensor& stats,
                     const Tensor& grad_logprobs, const Tensor& grad_entropy, int threads) {
  PolicyLossArgs args{};
  args.logprobs = tokens(logprobs);
  args.old_logprobs = tokens(old_logprobs);
  args.advantages = tokens(advantages);
  args.advantage_mean = std::get<0>(whitening);
  args.advantage_scale = std::get<1>(whitening);
  args.is_weights = tokens(is_weights);
  args.clip_low = std::get<0>(clips);
  args.clip_high = std::get<1>(clips);
  args.dual_clip = std::get<2>(clips);
  args.entropy = tokens(entropy);
  args.entropy_coef = entropy_coef;
  args.ref_logprobs = tokens(ref_logprobs);
  args.kl_coef = kl_coef;
  args.kl_estimator = KL(kl_estimator);
  args.objective = Objective(objective);
  args.ratio_level = RatioLevel(ratio_level);
  args.grad_logprobs = tokens(grad_logprobs);
  args.grad_entropy = tokens(grad_entropy);
  const DType dtype = common_dtype({&logprobs, &old_logprobs, &advantages, &is_weights, &entropy,
                                    &ref_logprobs});
  const bool of_sequences = args.ratio_level == RatioLevel::sequence;
  std::vector<double> row_weights, log_ratios;
  args.tokens = loss_tokens(dtype, rows(logprobs, cu_seqlens), mask, of_sequences, reducing,
                            threads, {&args.logprobs, &args.old_logprobs, &args.advantages,
                                      &args.is_weights, &args.entropy, &args.ref_logprobs,
                                      &args.grad_logprobs, &args.grad_entropy}, row_weights);
  if (of_sequences) log_ratios.resize(size_t(args.tokens.rows.count));
  args.log_ratios = log_ratios.data();
  std::vector<PolicySums> sums(loss_blocks(token_count(args.tokens.rows)));
  args.sums = sums.data();
  double results[7];
  args.results = results;
  active_isa().kernels->ppo_policy_loss(args);
  store_results(dtype, results, 7, loss, stats);
}

void ppo_value_loss(const Tensor& mask, const Tensor& cu_seqlens, const Tensor& values,
                    const Tensor& old_values, const Tensor& returns, double clip_range,
                    const Reducing& reducing, const Tensor& loss, const Tensor& stats,
                    const Tensor& grad_values, int threads) {
  ValueLossArgs args{};
  args.values = tokens(values);
  args.old_values = tokens(old_values);
  args.returns = tokens(returns);
  args.clip_range = clip_range;
  args.grad_values = tokens(grad_values);
  const DType dtype = common_dtype({&values, &old_values, &returns});
  std::vector<double> row_weights;
  args.tokens = loss_tokens(dtype, rows(values, cu_seqlens), mask, false, reducing, threads,
                            {&args.values, &args.old_values, &args.returns, &args.grad_values},
                            row_weights);
  std::vector<ValueSums> sums(loss_blocks(token_count(args.tokens.rows)));
  args.sums = sums.data();
  double results[6];
  args.results = results;
  active_isa().kernels->ppo_value_loss(args);
  store_results(dtype, results, 6, loss, stats);
}

}  // namespace
}  // namespace ppo
