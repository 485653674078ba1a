// The Bradley-Terry preference loss over P pairs, with statistics and gradients, in one sweep:
//
//   mean of softplus(-m) + center_coef (s+ + s-)^2,  m = s+ - s- - margin
//
// softplus(-m) = -log sigmoid(m) = max(-m, 0) + log(1 + e^{-|m|}); its derivative by m is
// -sigmoid(-m). Sums in float64 over blocks of a fixed size, merged in order.
#include <cmath>

#include "threads.h"
#include "tokens.h"

namespace ppo::PPO_ISA {
namespace {

template <class T>
void pairwise(const PairwiseLossArgs& args) {
  using A = Accumulator<T>;
  const Rows rows{1, args.count, nullptr};
  const Row<const T> chosen = row_of<const T>(args.chosen, rows, 0);
  const Row<const T> rejected = row_of<const T>(args.rejected, rows, 0);
  const Row<const T> margins = row_of<const T>(args.margins, rows, 0);
  const Row<A> grad_chosen = row_of<A>(args.grad_chosen, rows, 0);
  const Row<A> grad_rejected = row_of<A>(args.grad_rejected, rows, 0);
  const A margin = A(args.margin), center_coef = A(args.center_coef);
  const A weight = A(1.0 / double(args.count > 0 ? args.count : 1));

  const int64_t blocks = (args.count + kTokensPerBlock - 1) / kTokensPerBlock;
  parallel_for(blocks, args.threads, [&](int64_t block) {
    PairwiseSums sums{};
    for (int64_t p = block * kTokensPerBlock; p < args.count && p < (block + 1) * kTokensPerBlock;
         ++p) {
      const A better = widen(chosen[p]), worse = widen(rejected[p]);
      const A difference = better - worse, total = better + worse;
      const A m = difference - (margins ? widen(margins[p]) : margin);
      const A small = std::exp(-std::fabs(m));  // in [0, 1]: never overflows
      const A loss = (m < 0 ? -m : A(0)) + std::log1p(small);
      const A slope = (m < 0 ? A(1) : small) / (1 + small);  // sigmoid(-m)
      const A pull = 2 * center_coef * total;
      sums.loss += loss + center_coef * total * total;
      sums.wins += difference > 0 ? 1 : difference == 0 ? 0.5 : 0;
      sums.difference += difference;
      if (grad_chosen) grad_chosen[p] = (pull - slope) * weight;
      if (grad_rejected) grad_rejected[p] = (pull + slope) * weight;
    }
    args.sums[block] = sums;
  });

  PairwiseSums all{};
  for (int64_t block = 0; block < blocks; ++block) {
    all.loss += args.sums[block].loss;
    all.wins += args.sums[block].wins;
    all.difference += args.sums[block].difference;
  }
  const double n = double(args.count > 0 ? args.count : 1);
  args.results[0] = all.loss / n;
  args.results[1] = all.wins / n;
  args.results[2] = all.difference / n;
}

}  // namespace

void pairwise_loss(const PairwiseLossArgs& args) {
  with_dtype(args.dtype, [&](auto zero) { pairwise<decltype(zero)>(args); });
}

}  // namespace ppo::PPO_ISA
