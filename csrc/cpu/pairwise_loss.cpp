// The Bradley-Terry preference loss over P pairs, with statistics and gradients, in one sweep:
//
//   mean of softplus(-m) + center_coef (s+ + s-)^2,  m = s+ - s- - margin
//
// softplus(-m) = -log sigmoid(m) = max(-m, 0) + log(1 + e^{-|m|}); its derivative by m is
// -sigmoid(-m). Sums in float64 over blocks of a fixed size, merged in order.
#include "log_sigmoid.h"
#include "threads.h"

namespace ppo::PPO_ISA {
namespace {

template <class T, class A = Accumulator<T>>
struct PairTile {
  const uint8_t* inside;  // 0 past the last pair
  const T *chosen, *rejected, *margins;
  A *grad_chosen, *grad_rejected;
};

template <class A>
struct PairTotals {
  Total<A> loss, wins, ties, difference;
};

template <class T, class A = Accumulator<T>>
void pairwise_tile(const PairwiseLossArgs& args, const PairTile<T>& x, int64_t n, A weight,
                   PairTotals<A>& totals) {
  using V = Vec<A>;
  const V shared_margin = splat(A(args.margin));
  const A center_coef = A(args.center_coef);

  V loss_sum{}, difference_sum{};
  Truth<A> wins{}, ties{};
  for (int64_t p = 0; p < n; p += kWidth<A>) {
    const Truth<A> inside = real_lanes<A>(x.inside + p);
    const V better = load(x.chosen + p), worse = load(x.rejected + p);
    const V difference = better - worse, total = better + worse;
    const V m = difference - (x.margins ? load(x.margins + p) : shared_margin);
    const V small = exp_minus_magnitude<A>(m);
    const V loss = (m < A(0) ? -m : V{}) + log1p_unit<A>(small);
    const V slope = sigmoid_of_minus<A>(m, small);
    const V pull = A(2) * center_coef * total;
    if (x.grad_chosen) store(x.grad_chosen + p, (pull - slope) * weight);
    if (x.grad_rejected) store(x.grad_rejected + p, (pull + slope) * weight);

    loss_sum += where<A>(inside, loss + center_coef * total * total);
    difference_sum += difference;
    wins += difference > A(0);
    ties += inside & (difference == A(0));
  }
  totals.loss.add(loss_sum);
  totals.wins.add_count(wins);
  totals.ties.add_count(ties);
  totals.difference.add(difference_sum);
}

template <class T>
void pairwise(const PairwiseLossArgs& args) {
  using A = Accumulator<T>;
  const Rows rows{1, args.count, nullptr};
  const Row<const T> chosen = row_of<const T>(args.chosen, rows, 0);
  const Row<const T> rejected = row_of<const T>(args.rejected, rows, 0);
  const Row<const T> margins = row_of<const T>(args.margins, rows, 0);
  const Row<A> grad_chosen = row_of<A>(args.grad_chosen, rows, 0);
  const Row<A> grad_rejected = row_of<A>(args.grad_rejected, rows, 0);
  const A weight = A(1.0 / double(args.count > 0 ? args.count : 1));

  const int64_t blocks = (args.count + kTokensPerBlock - 1) / kTokensPerBlock;
  parallel_for(blocks, args.threads, [&](int64_t block) {
    PairTotals<A> totals;
    const int64_t first = block * kTokensPerBlock;
    const int64_t last = args.count - first < kTokensPerBlock ? args.count : first + kTokensPerBlock;
    uint8_t inside_room[kTile];
    T room[3][kTile];
    A grad_room[2][kTile];
    for (int64_t p = first; p < last; p += kTile) {
      const int64_t n = last - p < kTile ? last - p : kTile;
      const PairTile<T> x{mask_tile<A>({nullptr, 0}, p, n, inside_room),
                          tile<A>(chosen, p, n, room[0]),
                          tile<A>(rejected, p, n, room[1]),
                          tile<A>(margins, p, n, room[2]),
                          out_tile(grad_chosen, p, n, grad_room[0]),
                          out_tile(grad_rejected, p, n, grad_room[1])};
      pairwise_tile<T>(args, x, n, weight, totals);
      deliver(grad_chosen, p, n, grad_room[0], x.grad_chosen);
      deliver(grad_rejected, p, n, grad_room[1], x.grad_rejected);
    }
    args.sums[block] = {totals.loss.sum(), totals.wins.sum() + totals.ties.sum() / 2,
                        totals.difference.sum()};
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
