// The Bradley-Terry preference loss over P pairs, with statistics and gradients, in one sweep:
//
//   mean of softplus(-m) + center_coef (s+ + s-)^2,  m = s+ - s- - margin
//
// softplus(-m) = -log sigmoid(m) = max(-m, 0) + log(1 + e^{-|m|}); its derivative by m is
// -sigmoid(-m). Sums in float64 over blocks of a fixed size, merged in order.
#include "exp.h"
#include "threads.h"
#include "tiles.h"

namespace ppo::PPO_ISA {
namespace {

// Minimax (Remez) for atanh(sqrt w) / sqrt w on 0 <= w <= 1/9, to 2^-28 and 2^-59.
template <class A> constexpr A kAtanh[] = {A(0)};
template <>
constexpr float kAtanh<float>[] = {1.0000000039605129781f, 0.33333157341100187853f,
                                   0.2001245513664655036f, 0.13980301446420738036f,
                                   0.14089167122724495627f};
template <>
constexpr double kAtanh<double>[] = {
    1.0000000000000000012, 0.33333333333333067102, 0.20000000000095167061, 0.14285714272462141048,
    0.11111112055907977386, 0.09090869893233185709, 0.076933177385639398109, 0.066500511247085687636,
    0.060561254090654201388, 0.041578385290059707772, 0.085300373642613955566};

// log(1 + x) for 0 <= x <= 1, as 2 atanh(s) with s = x / (2 + x): small x lose nothing.
template <class A>
inline Vec<A> log1p_unit(Vec<A> x) {
  constexpr int degree = int(sizeof(kAtanh<A>) / sizeof(A)) - 1;
  const Vec<A> s = x / (x + A(2)), w = s * s;
  Vec<A> p = splat(kAtanh<A>[degree]);
  for (int k = degree - 1; k >= 0; --k) p = p * w + kAtanh<A>[k];
  return (s + s) * p;
}

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
  const V shared_margin = splat(A(args.margin)), limit = splat(kExpMax<A>);
  const A center_coef = A(args.center_coef);

  V loss_sum{}, difference_sum{};
  Truth<A> wins{}, ties{};
  for (int64_t p = 0; p < n; p += kWidth<A>) {
    const Truth<A> inside = real_lanes<A>(x.inside + p);
    const V better = load(x.chosen + p), worse = load(x.rejected + p);
    const V difference = better - worse, total = better + worse;
    const V m = difference - (x.margins ? load(x.margins + p) : shared_margin);
    const V size = magnitude<A>(m);
    const V small = exp_bounded<A>(-(size > limit ? limit : size));  // in [0, 1]
    const V loss = (m < A(0) ? -m : V{}) + log1p_unit<A>(small);
    const V slope = (m < A(0) ? splat(A(1)) : small) / (small + A(1));  // sigmoid(-m)
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
