// The call of the loss of pairs.
#pragma once

#include <vector>

#include "arguments.h"
#include "losses.h"

namespace ppo {
namespace {

void pairwise_loss(const Tensor& chosen, const Tensor& rejected, const Tensor& margins,
                   double margin, double center_coef, const Tensor& loss, const Tensor& stats,
                   const Tensor& grad_chosen, const Tensor& grad_rejected, int threads) {
  PairwiseLossArgs args{};
  args.dtype = common_dtype({&chosen, &rejected, &margins});
  args.count = chosen.size(0);
  args.chosen = tokens(chosen);
  args.rejected = tokens(rejected);
  args.margins = tokens(margins);
  args.margin = margin;
  args.center_coef = center_coef;
  args.grad_chosen = tokens(grad_chosen);
  args.grad_rejected = tokens(grad_rejected);
  args.threads = threads_for(args.count, threads);
  std::vector<PairwiseSums> sums(loss_blocks(args.count));
  args.sums = sums.data();
  double results[3];
  args.results = results;
  active_isa().kernels->pairwise_loss(args);
  store_results(args.dtype, results, 3, loss, stats);
}

}  // namespace
}  // namespace ppo
