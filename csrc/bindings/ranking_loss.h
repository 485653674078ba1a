// The call of the loss of rankings.
#pragma once

#include <algorithm>
#include <vector>

#include "arguments.h"
#include "losses.h"

namespace ppo {
namespace {

void ranking_loss(const Tensor& scores, const Tensor& ranks, const Tensor& loss,
                  const Tensor& stats, const Tensor& grad_scores, int threads) {
  constexpr int64_t pairs_per_block = 65536;
  RankingLossArgs args{};
  args.dtype = scores.dtype();
  args.prompts = scores.size(0);
  args.responses = scores.size(1);
  args.scores = tokens(scores);
  args.ranks = tokens(ranks);
  args.ranks_are_int64 = ranks.is_int64();
  args.grad_scores = tokens(grad_scores);
  const int64_t pairs = std::max<int64_t>(args.responses * args.responses / 2, 1);
  args.prompts_per_block = std::max<int64_t>(pairs_per_block / pairs, 1);
  args.threads = threads_for(args.prompts * pairs, threads);
  std::vector<RankingSums> sums(size_t(args.prompts / args.prompts_per_block + 1));
  args.sums = sums.data();
  double results[3];
  args.results = results;
  active_isa().kernels->ranking_loss(args);
  store_results(args.dtype, results, 3, loss, stats);
}

}  // namespace
}  // namespace ppo
