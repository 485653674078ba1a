// PPO's clipped policy loss and clipped value loss: loss, statistics and gradient in one sweep over
// the tokens, block by block (sweep.h) and tile by tile (tiles.h).
//
// Masked tokens are 0 before any arithmetic; where one lane's input could otherwise count (a ratio
// of 1), its result is made 0 too.
#include <cmath>

#include "exp.h"
#include "sweep.h"
#include "tiles.h"

namespace ppo::PPO_ISA {
namespace {

constexpr double kMaxLogRatio = 20;

// --- Policy loss ---------------------------------------------------------------------------------

// k(pi, ref) and its derivative by log pi (Schulman 2020, joschu.net/blog/kl-approx.html).
template <class A>
inline void kl_estimate(KL estimator, Vec<A> log_ratio, Vec<A>& k, Vec<A>& slope) {
  if (estimator == KL::k1) {
    k = log_ratio;
    slope = splat(A(1));
  } else if (estimator == KL::k2) {
    k = log_ratio * log_ratio * A(0.5);
    slope = log_ratio;
  } else {
    const Vec<A> limit = splat(A(kMaxLogRatio));
    const Vec<A> bounded = clamp<A>(log_ratio, -limit, limit);
    const Vec<A> tail = expm1_bounded<A>(-bounded);
    k = tail + bounded;
    slope = magnitude<A>(log_ratio) > limit ? Vec<A>{} : -tail;
  }
}

// One tile, or null where a tensor is absent.
template <class T, class A = Accumulator<T>>
struct PolicyTile {
  const uint8_t* mask;
  const T *logprobs, *old_logprobs, *advantages, *is_weights, *ref_logprobs, *entropy;
  A *grad_logprobs, *grad_entropy;
};

template <class A>
struct PolicyTotals {
  Total<A> count, loss, log_ratio_sq, clipped, ratio, kl, entropy;
  Vec<A> ratio_max{};
};

// What a sequence's tokens share where the ratio is one of sequences.
template <class A>
struct SequenceRatio {
  A log_ratio, ratio;
};

// kExtras: there may be a dual clip, weights, a KL penalty, an entropy bonus.
template <class T, Objective kObjective, RatioLevel kLevel, bool kExtras, class A = Accumulator<T>>
void policy_tile(const PolicyLossArgs& args, const PolicyTile<T>& x, int64_t n, double weight,
                 SequenceRatio<A> shared, PolicyTotals<A>& totals) {
  using V = Vec<A>;
  const V limit = splat(A(kMaxLogRatio));
  const V ratio_low = splat(A(1 - args.clip_low)), ratio_high = splat(A(1 + args.clip_high));
  const A mean = A(args.advantage_mean), scale = A(args.advantage_scale);
  const A dual_clip = A(args.dual_clip), kl_coef = A(args.kl_coef);
  const A entropy_coef = A(args.entropy_coef), token_weight = A(weight);

  Truth<A> count{}, clipped_count{};
  V ratio_max{}, loss_sum{}, log_ratio_sq_sum{}, ratio_sum{}, kl_sum{}, entropy_sum{};
  for (int64_t t = 0; t < n; t += kWidth<A>) {
    const Truth<A> real = real_lanes<A>(x.mask + t);
    const auto loaded = [&](const T* data) { return where<A>(real, load(data + t)); };
    const V logprob = load(x.logprobs + t);
    const V advantage = where<A>(real, (load(x.advantages + t) - mean) * scale);

    const V log_ratio = where<A>(real, logprob - load(x.old_logprobs + t));
    V held = log_ratio, ratio;  // rho = exp(log pi - log pi_old), or the sequence's
    if constexpr (kLevel == RatioLevel::sequence) {
      held = splat(shared.log_ratio);
      ratio = where<A>(real, splat(shared.ratio));
    } else {
      ratio = where<A>(real, exp_bounded<A>(clamp<A>(log_ratio, -limit, limit)));
    }
    V loss, grad;
    Truth<A> is_clipped;
    if constexpr (kObjective == Objective::cispo) {
      // -clip(rho) A log pi, the clipped ratio a constant.
      is_clipped = real & ((ratio < ratio_low) | (ratio > ratio_high));
      grad = -advantage * clamp<A>(ratio, ratio_low, ratio_high);
      loss = grad * where<A>(real, logprob);
    } else {
      // max(-A rho, -A clip(rho)), in a tie the unclipped branch.
      const V unclipped = -advantage * ratio;
      const V clipped = -advantage * clamp<A>(ratio, ratio_low, ratio_high);
      is_clipped = clipped > unclipped;
      loss = is_clipped ? clipped : unclipped;
      // d(-A rho) / d log pi = -A rho, where neither clip nor clamp holds it.
      grad = is_clipped | (magnitude<A>(held) > limit) ? V{} : unclipped;
    }

    if (kExtras) {
      // The dual clip: at most -c A where A < 0.
      const V bound = -dual_clip * advantage;
      const Truth<A> is_bounded = (advantage < A(0)) & (bound < loss);
      loss = is_bounded ? bound : loss;
      grad = is_bounded ? V{} : grad;
      if (x.is_weights) {
        const V w = loaded(x.is_weights);
        loss *= w;
        grad *= w;
      }
      if (x.ref_logprobs) {
        V k, slope;
        const V to_ref = where<A>(real, logprob - load(x.ref_logprobs + t));
        kl_estimate<A>(args.kl_estimator, to_ref, k, slope);
        loss += kl_coef * k;
        grad += where<A>(real, kl_coef * slope);
        kl_sum += k;
      }
      if (x.entropy) {
        const V h = loaded(x.entropy);
        loss -= entropy_coef * h;
        entropy_sum += h;
      }
      if (x.grad_entropy) {
        store(x.grad_entropy + t, where<A>(real, splat(-entropy_coef * token_weight)));
      }
    }
    if (x.grad_logprobs) store(x.grad_logprobs + t, grad * token_weight);

    count += real;
    clipped_count += is_clipped;
    ratio_max = larger(ratio, ratio_max);
    loss_sum += loss;
    log_ratio_sq_sum += log_ratio * log_ratio;
    ratio_sum += ratio;
  }
  totals.count.add_count(count);
  totals.loss.add(loss_sum);
  totals.log_ratio_sq.add(log_ratio_sq_sum);
  totals.clipped.add_count(clipped_count);
  totals.ratio.add(ratio_sum);
  totals.ratio_max = larger(ratio_max, totals.ratio_max);
  totals.kl.add(kl_sum);
  totals.entropy.add(entropy_sum);
}

// Tokens first to last of row b.
template <class T, Objective kObjective, RatioLevel kLevel>
void policy_sweep(const PolicyLossArgs& args, PolicySums& sums, int64_t b, int64_t first,
                  int64_t last, double weight) {
  using A = Accumulator<T>;
  const auto row = [&](const Tokens& x) { return row_of<const T>(x, args.tokens.rows, b); };
  const Row<const T> logprobs = row(args.logprobs), old_logprobs = row(args.old_logprobs);
  const Row<const T> advantages = row(args.advantages), entropy = row(args.entropy);
  const Row<const T> ref_logprobs = row(args.ref_logprobs), is_weights = row(args.is_weights);
  const Row<const uint8_t> mask = row_of<const uint8_t>(args.tokens.mask, args.tokens.rows, b);
  const Row<A> grad_logprobs = row_of<A>(args.grad_logprobs, args.tokens.rows, b);
  const Row<A> grad_entropy = row_of<A>(args.grad_entropy, args.tokens.rows, b);
  const bool extras = entropy || ref_logprobs || is_weights || std::isfinite(args.dual_clip);

  uint8_t mask_room[kTile];
  T room[6][kTile];
  A grad_room[2][kTile];
  PolicyTotals<A> totals;
  SequenceRatio<A> shared{};
  if constexpr (kLevel == RatioLevel::sequence) {
    const double log_ratio = args.log_ratios[b];
    const double above = log_ratio < -kMaxLogRatio ? -kMaxLogRatio : log_ratio;
    shared = {A(log_ratio), A(std::exp(above > kMaxLogRatio ? kMaxLogRatio : above))};
  }
  for (int64_t t = first; t < last; t += kTile) {
    const int64_t n = last - t < kTile ? last - t : kTile;
    const PolicyTile<T> x{
        mask_tile<A>(mask, t, n, mask_room),       tile<A>(logprobs, t, n, room[0]),
        tile<A>(old_logprobs, t, n, room[1]),      tile<A>(advantages, t, n, room[2]),
        tile<A>(is_weights, t, n, room[3]),        tile<A>(ref_logprobs, t, n, room[4]),
        tile<A>(entropy, t, n, room[5]),           out_tile(grad_logprobs, t, n, grad_room[0]),
        out_tile(grad_entropy, t, n, grad_room[1])};
    extras ? policy_tile<T, kObjective, kLevel, true>(args, x, n, weight, shared, totals)
           : policy_tile<T, kObjective, kLevel, false>(args, x, n, weight, shared, totals);
    deliver(grad_logprobs, t, n, grad_room[0], x.grad_logprobs);
    deliver(grad_entropy, t, n, grad_room[1], x.grad_entropy);
  }
  sums.count += totals.count.sum();
  sums.loss += totals.loss.sum() * weight;
  sums.log_ratio_sq += totals.log_ratio_sq.sum();
  sums.clipped += totals.clipped.sum();
  sums.ratio += totals.ratio.sum();
  const double ratio_max = max_lanes<A>(totals.ratio_max);
  sums.ratio_max = ratio_max > sums.ratio_max ? ratio_max : sums.ratio_max;
  sums.kl += totals.kl.sum();
  sums.entropy += totals.entropy.sum();
}

// Row b's mean over its real tokens of log pi - log pi_old; 0 without any.
template <class T, class A = Accumulator<T>>
double mean_log_ratio(const PolicyLossArgs& args, int64_t b) {
  const Rows& rows = args.tokens.rows;
  const Row<const T> logprobs = row_of<const T>(args.logprobs, rows, b);
  const Row<const T> old_logprobs = row_of<const T>(args.old_logprobs, rows, b);
  const Row<const uint8_t> mask = row_of<const uint8_t>(args.tokens.mask, rows, b);
  uint8_t mask_room[kTile];
  T room[2][kTile];
  Total<A> sum, counted;
  const int64_t size = row_size(rows, b);
  for (int64_t t = 0; t < size; t += kTile) {
    const int64_t n = size - t < kTile ? size - t : kTile;
    const uint8_t* m = mask_tile<A>(mask, t, n, mask_room);
    const T* x = tile<A>(logprobs, t, n, room[0]);
    const T* old = tile<A>(old_logprobs, t, n, room[1]);
    Truth<A> count{};
    for (int64_t i = 0; i < n; i += kWidth<A>) {
      const Truth<A> real = real_lanes<A>(m + i);
      sum.add(where<A>(real, load(x + i) - load(old + i)));
      count += real;
    }
    counted.add_count(count);
  }
  const double count = counted.sum();
  return count > 0 ? sum.sum() / count : 0;
}

// Fills in the log-ratios of the sequences: several short ones to a task, a long one alone.
template <class T>
void sequence_log_ratios(const PolicyLossArgs& args) {
  const Rows& rows = args.tokens.rows;
  const int64_t blocks = block_count(rows), at_least_one = blocks > 0 ? blocks : 1;
  const int64_t per_task = (rows.count + at_least_one - 1) / at_least_one;
  parallel_for(blocks, args.tokens.threads, [&](int64_t task) {
    for (int64_t b = task * per_task; b < rows.count && b < (task + 1) * per_task; ++b) {
      args.log_ratios[b] = mean_log_ratio<T>(args, b);
    }
  });
}

template <class T, Objective kObjective, RatioLevel kLevel>
void policy_blocks(const PolicyLossArgs& args, double divisor) {
  sweep_blocks(args.tokens, divisor, args.sums,
               [&](PolicySums& sums, int64_t b, int64_t first, int64_t last, double weight) {
                 policy_sweep<T, kObjective, kLevel>(args, sums, b, first, last, weight);
               });
}

template <class T>
void policy_loss(const PolicyLossArgs& args) {
  const double divisor = denominator(args.tokens, args.sums);
  const bool cispo = args.objective == Objective::cispo;
  if (args.ratio_level == RatioLevel::sequence) {
    sequence_log_ratios<T>(args);
    cispo ? policy_blocks<T, Objective::cispo, RatioLevel::sequence>(args, divisor)
          : policy_blocks<T, Objective::clip, RatioLevel::sequence>(args, divisor);
  } else {
    cispo ? policy_blocks<T, Objective::cispo, RatioLevel::token>(args, divisor)
          : policy_blocks<T, Objective::clip, RatioLevel::token>(args, divisor);
  }
  PolicySums all{};
  for (int64_t block = 0; block < block_count(args.tokens.rows); ++block) {
    const PolicySums& one = args.sums[block];
    all.count += one.count;
    all.loss += one.loss;
    all.log_ratio_sq += one.log_ratio_sq;
    all.clipped += one.clipped;
    all.ratio += one.ratio;
    all.ratio_max = one.ratio_max > all.ratio_max ? one.ratio_max : all.ratio_max;
    all.kl += one.kl;
    all.entropy += one.entropy;
  }
  const double n = all.count > 0 ? all.count : 1;
  double* results = args.results;
  results[0] = all.loss;
  results[1] = all.log_ratio_sq / 2 / n;
  results[2] = all.clipped / n;
  results[3] = all.ratio / n;
  results[4] = all.ratio == all.ratio ? all.ratio_max : all.ratio;  // NaN, which max ignored
  results[5] = all.kl / n;
  results[6] = all.entropy / n;
}

// --- Value loss ----------------------------------------------------------------------------------

template <class T, class A = Accumulator<T>>
struct ValueTile {
  const uint8_t* mask;
  const T *values, *old_values, *returns;
  A* grad_values;  // or null
};

template <class A>
struct ValueTotals {
  Total<A> count, loss, clipped, value, error_sq, shifted, shifted_sq;
};

// `origin` is one of the returns: moments about it lose nothing to a large mean.
template <class T, class A = Accumulator<T>>
void value_tile(const ValueLossArgs& args, const ValueTile<T>& x, int64_t n, double weight,
                A origin, ValueTotals<A>& totals) {
  using V = Vec<A>;
  const A clip_range = A(args.clip_range), token_weight = A(weight);

  Truth<A> count{}, clipped_count{};
  V loss_sum{}, value_sum{}, error_sq_sum{}, shifted_sum{}, shifted_sq_sum{};
  for (int64_t t = 0; t < n; t += kWidth<A>) {
    const Truth<A> real = real_lanes<A>(x.mask + t);
    const auto loaded = [&](const T* data) { return where<A>(real, load(data + t)); };
    const V value = loaded(x.values), old_value = loaded(x.old_values);
    const V target = loaded(x.returns);

    // max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2) / 2, in a tie the unclipped branch;
    // the clipped one is larger only where the clip holds, so that its derivative is 0.
    const V error = value - target, error_sq = error * error;
    const V clipped = clamp<A>(value, old_value - clip_range, old_value + clip_range) - target;
    const V clipped_sq = clipped * clipped;
    const Truth<A> is_clipped = clipped_sq > error_sq;
    const V grad = is_clipped ? V{} : error;
    if (x.grad_values) store(x.grad_values + t, where<A>(real, grad * token_weight));

    const V shifted = where<A>(real, target - origin);
    count += real;
    clipped_count += is_clipped;
    loss_sum += is_clipped ? clipped_sq : error_sq;
    value_sum += value;
    error_sq_sum += error_sq;
    shifted_sum += shifted;
    shifted_sq_sum += shifted * shifted;
  }
  totals.count.add_count(count);
  totals.loss.add(loss_sum);
  totals.clipped.add_count(clipped_count);
  totals.value.add(value_sum);
  totals.error_sq.add(error_sq_sum);
  totals.shifted.add(shifted_sum);
  totals.shifted_sq.add(shifted_sq_sum);
}

template <class T>
void value_sweep(const ValueLossArgs& args, ValueSums& sums, int64_t b, int64_t first, int64_t last,
                 double weight) {
  using A = Accumulator<T>;
  const auto row = [&](const Tokens& x) { return row_of<const T>(x, args.tokens.rows, b); };
  const Row<const T> values = row(args.values), old_values = row(args.old_values);
  const Row<const T> returns = row(args.returns);
  const Row<const uint8_t> mask = row_of<const uint8_t>(args.tokens.mask, args.tokens.rows, b);
  const Row<A> grad_values = row_of<A>(args.grad_values, args.tokens.rows, b);
  int64_t any_real = first;
  while (mask && any_real < last && !mask[any_real]) ++any_real;
  const A origin = any_real < last ? widen(returns[any_real]) : A(0);

  uint8_t mask_room[kTile];
  T room[3][kTile];
  A grad_room[kTile];
  ValueTotals<A> totals;
  for (int64_t t = first; t < last; t += kTile) {
    const int64_t n = last - t < kTile ? last - t : kTile;
    const ValueTile<T> x{mask_tile<A>(mask, t, n, mask_room), tile<A>(values, t, n, room[0]),
                         tile<A>(old_values, t, n, room[1]), tile<A>(returns, t, n, room[2]),
                         out_tile(grad_values, t, n, grad_room)};
    value_tile<T>(args, x, n, weight, origin, totals);
    deliver(grad_values, t, n, grad_room, x.grad_values);
  }
  const double count = totals.count.sum();
  sums.count += count;
  sums.loss += totals.loss.sum() / 2 * weight;
  sums.clipped += totals.clipped.sum();
  sums.value += totals.value.sum();
  sums.error_sq += totals.error_sq.sum();
  const MomentSums about{double(origin), count, totals.shifted.sum(), totals.shifted_sq.sum()};
  sums.returns = merged(sums.returns, moments_of(about));
}

template <class T>
void value_loss(const ValueLossArgs& args) {
  const double divisor = denominator(args.tokens, args.sums);
  sweep_blocks(args.tokens, divisor, args.sums,
               [&](ValueSums& sums, int64_t b, int64_t first, int64_t last, double weight) {
                 value_sweep<T>(args, sums, b, first, last, weight);
               });
  ValueSums all{};
  for (int64_t block = 0; block < block_count(args.tokens.rows); ++block) {
    const ValueSums& one = args.sums[block];
    all.count += one.count;
    all.loss += one.loss;
    all.clipped += one.clipped;
    all.value += one.value;
    all.error_sq += one.error_sq;
    all.returns = merged(all.returns, one.returns);
  }
  const double n = all.count > 0 ? all.count : 1;
  double* results = args.results;
  results[0] = all.loss;
  results[1] = all.clipped / n;
  results[2] = all.value / n;
  results[3] = all.returns.mean;
  results[4] = all.error_sq / n;
  results[5] = all.returns.m2 / n;
}

}  // namespace

void ppo_policy_loss(const PolicyLossArgs& args) {
  with_dtype(args.tokens.dtype, [&](auto zero) { policy_loss<decltype(zero)>(args); });
}

void ppo_value_loss(const ValueLossArgs& args) {
  with_dtype(args.tokens.dtype, [&](auto zero) { value_loss<decltype(zero)>(args); });
}

}  // namespace ppo::PPO_ISA
