// PPO's clipped policy loss and clipped value loss: loss, statistics and gradient in one sweep over
// the tokens, kLanes at a time.
//
// Blocks of tokens are of a fixed size, summed in float64, and merged in order, so that results are
// the same bits for any number of threads. Masked tokens are 0 before any arithmetic; where one
// lane's input could otherwise count (a ratio of 1), its result is made 0 too.
#include "simd.h"
#include "threads.h"
#include "tokens.h"

namespace ppo::PPO_ISA {
namespace {

constexpr double kMaxLogRatio = 20;

// --- Tokens in lanes -----------------------------------------------------------------------------

// Of a comparison: all bits set in the lanes where it holds.
template <class A> using Truth = decltype(Vec<A>{} < Vec<A>{});

template <class A>
inline Vec<A> where(Truth<A> condition, Vec<A> x) {
  return condition ? x : Vec<A>{};
}

template <class A>
inline Vec<A> clamp(Vec<A> x, Vec<A> low, Vec<A> high) {  // NaN stays
  x = x < low ? low : x;
  return x > high ? high : x;
}

// The n <= kLanes tokens of a row from t on, and which of them are real.
template <class T>
class Chunk {
 public:
  using A = Accumulator<T>;

  Chunk(const Row<const uint8_t>& mask, int64_t t, int64_t n) : t_(t), n_(n) {
    Truth<A> bytes{};
    if (n == kLanes<A> && (!mask || mask.stride == 1)) {
      using Bytes = typename VectorTypes<A>::Bytes;
      bytes = mask ? __builtin_convertvector(load_bits<Bytes>(mask.data + t), Truth<A>) : ~bytes;
    } else {
      for (int i = 0; i < n; ++i) bytes[i] = mask ? mask[t + i] : 1;
    }
    real = bytes != 0;
  }

  Vec<A> load(const Row<const T>& row) const {
    if (n_ == kLanes<A> && row.stride == 1) return where<A>(real, PPO_ISA::load(row.data + t_));
    Vec<A> x{};
    for (int i = 0; i < n_; ++i) x[i] = widen(row[t_ + i]);
    return where<A>(real, x);
  }

  void store(const Row<A>& row, Vec<A> x) const {
    if (n_ == kLanes<A> && row.stride == 1) return PPO_ISA::store(row.data + t_, x);
    for (int i = 0; i < n_; ++i) row[t_ + i] = x[i];
  }

  Truth<A> real;

 private:
  int64_t t_;
  int64_t n_;
};

// A sum in float64, lane by lane.
template <class A>
class LaneSum {
 public:
  void add(Vec<A> x) { lanes_ += __builtin_convertvector(x, Doubles); }
  double total() const {
    double sum = 0;
    for (int i = 0; i < kLanes<A>; ++i) sum += lanes_[i];
    return sum;
  }

 private:
  using Doubles = typename VectorTypes<A>::Doubles;
  Doubles lanes_{};
};

// --- Blocks, weights and denominators ------------------------------------------------------------

inline int64_t token_count(const Rows& rows) {
  return rows.cu_seqlens ? rows.length : rows.count * rows.length;
}

inline int64_t block_count(const Rows& rows) {
  return (token_count(rows) + kTokensPerBlock - 1) / kTokensPerBlock;
}

// Calls body(b, first, last) for each piece of a row in a block: tokens first to last of row b.
template <class Body>
void for_pieces(const Rows& rows, int64_t block, const Body& body) {
  const int64_t* cu = rows.cu_seqlens;
  int64_t token = block * kTokensPerBlock;
  const int64_t total = token_count(rows);
  const int64_t end = token + kTokensPerBlock < total ? token + kTokensPerBlock : total;
  int64_t b = 0;
  if (cu == nullptr) {
    b = token / rows.length;
  } else {
    for (int64_t above = rows.count; above - b > 1;) {  // cu[b] <= token < cu[above]
      const int64_t middle = b + (above - b) / 2;
      (cu[middle] <= token ? b : above) = middle;
    }
  }
  for (; token < end; ++b) {
    const int64_t row_start = cu ? cu[b] : b * rows.length;
    const int64_t first = token - row_start;
    const int64_t size = row_size(rows, b);
    const int64_t last = end - row_start < size ? end - row_start : size;
    body(b, first, last);
    token = row_start + last;
  }
}

inline int64_t count_real(const LossTokens& tokens, int64_t b, int64_t first, int64_t last) {
  const Row<const uint8_t> mask = row_of<const uint8_t>(tokens.mask, tokens.rows, b);
  if (!mask) return last - first;
  int64_t count = 0;
  for (int64_t t = first; t < last; ++t) count += mask[t] != 0;
  return count;
}

// What the sum of the row-weighted token losses is divided by. Fills in row_weights, 1 over the
// number of each sequence's real tokens. `sums` (any with a count) is scratch.
template <class Sums>
double denominator(const LossTokens& tokens, Sums* sums) {
  const Rows& rows = tokens.rows;
  double found = 1;
  if (tokens.reduction == Reduction::sequence_mean) {
    constexpr int64_t per_task = 64;
    parallel_for((rows.count + per_task - 1) / per_task, tokens.threads, [&](int64_t task) {
      for (int64_t b = task * per_task; b < rows.count && b < (task + 1) * per_task; ++b) {
        const int64_t count = count_real(tokens, b, 0, row_size(rows, b));
        tokens.row_weights[b] = count ? 1.0 / double(count) : 0;
      }
    });
    found = 0;
    for (int64_t b = 0; b < rows.count; ++b) found += tokens.row_weights[b] > 0;
  } else if (tokens.reduction == Reduction::token_mean && tokens.normalizer < 0) {
    found = double(token_count(rows));
    if (tokens.mask.data) {
      const int64_t blocks = block_count(rows);
      parallel_for(blocks, tokens.threads, [&](int64_t block) {
        int64_t count = 0;
        for_pieces(rows, block, [&](int64_t b, int64_t first, int64_t last) {
          count += count_real(tokens, b, first, last);
        });
        sums[block].count = double(count);
      });
      found = 0;
      for (int64_t block = 0; block < blocks; ++block) found += sums[block].count;
    }
  }
  if (tokens.normalizer >= 0) found = tokens.normalizer;
  return found == 0 ? 1 : found;
}

// Calls sweep(sum of the block, b, first, last, weight of each token) for every piece of a row.
template <class Sums, class Sweep>
void sweep_blocks(const LossTokens& tokens, double denominator, Sums* sums, const Sweep& sweep) {
  parallel_for(block_count(tokens.rows), tokens.threads, [&](int64_t block) {
    Sums of_block{};
    for_pieces(tokens.rows, block, [&](int64_t b, int64_t first, int64_t last) {
      const double weight = (tokens.row_weights ? tokens.row_weights[b] : 1) / denominator;
      sweep(of_block, b, first, last, weight);
    });
    sums[block] = of_block;
  });
}

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
    slope = (log_ratio < -limit) | (log_ratio > limit) ? Vec<A>{} : -tail;
  }
}

template <class T>
void policy_sweep(const PolicyLossArgs& args, PolicySums& sums, int64_t b, int64_t first,
                  int64_t last, double weight) {
  using A = Accumulator<T>;
  using V = Vec<A>;
  const auto row = [&](const Tokens& x) { return row_of<const T>(x, args.tokens.rows, b); };
  const Row<const T> logprobs = row(args.logprobs), old_logprobs = row(args.old_logprobs);
  const Row<const T> advantages = row(args.advantages), entropy = row(args.entropy);
  const Row<const T> ref_logprobs = row(args.ref_logprobs), is_weights = row(args.is_weights);
  const Row<const uint8_t> mask = row_of<const uint8_t>(args.tokens.mask, args.tokens.rows, b);
  const Row<A> grad_logprobs = row_of<A>(args.grad_logprobs, args.tokens.rows, b);
  const Row<A> grad_entropy = row_of<A>(args.grad_entropy, args.tokens.rows, b);
  const V limit = splat(A(kMaxLogRatio));
  const V ratio_low = splat(A(1 - args.clip_low)), ratio_high = splat(A(1 + args.clip_high));
  const A mean = A(args.advantage_mean), scale = A(args.advantage_scale);
  const A dual_clip = A(args.dual_clip), kl_coef = A(args.kl_coef);
  const A entropy_coef = A(args.entropy_coef), token_weight = A(weight);

  V count{}, clipped_count{}, ratio_max = splat(A(sums.ratio_max));
  LaneSum<A> loss_sum, log_ratio_sq_sum, ratio_sum, kl_sum, entropy_sum;
  for (int64_t t = first; t < last; t += kLanes<A>) {
    const Chunk<T> chunk(mask, t, last - t < kLanes<A> ? last - t : kLanes<A>);
    const V logprob = chunk.load(logprobs);
    const V advantage = where<A>(chunk.real, (chunk.load(advantages) - mean) * scale);

    // rho = exp(log pi - log pi_old); max(-A rho, -A clip(rho)), in a tie the unclipped branch.
    const V log_ratio = logprob - chunk.load(old_logprobs);
    const V ratio = where<A>(chunk.real, exp_bounded<A>(clamp<A>(log_ratio, -limit, limit)));
    const V unclipped = -advantage * ratio;
    const V clipped = -advantage * clamp<A>(ratio, ratio_low, ratio_high);
    const Truth<A> is_clipped = clipped > unclipped;
    V loss = is_clipped ? clipped : unclipped;
    // d(-A rho) / d log pi = -A rho, where neither clip nor clamp holds it.
    V grad = is_clipped | (log_ratio < -limit) | (log_ratio > limit) ? V{} : unclipped;

    // The dual clip: at most -c A where A < 0.
    const V bound = -dual_clip * advantage;
    const Truth<A> is_bounded = (advantage < A(0)) & (bound < loss);
    loss = is_bounded ? bound : loss;
    grad = is_bounded ? V{} : grad;

    if (is_weights) {
      const V w = chunk.load(is_weights);
      loss *= w;
      grad *= w;
    }
    if (ref_logprobs) {
      V k, slope;
      kl_estimate<A>(args.kl_estimator, logprob - chunk.load(ref_logprobs), k, slope);
      loss += kl_coef * k;
      grad += where<A>(chunk.real, kl_coef * slope);
      kl_sum.add(k);
    }
    if (entropy) {
      const V h = chunk.load(entropy);
      loss -= entropy_coef * h;
      entropy_sum.add(h);
    }
    if (grad_logprobs) chunk.store(grad_logprobs, grad * token_weight);
    if (grad_entropy) {
      chunk.store(grad_entropy, where<A>(chunk.real, splat(-entropy_coef * token_weight)));
    }

    count += where<A>(chunk.real, splat(A(1)));
    clipped_count += where<A>(is_clipped, splat(A(1)));
    ratio_max = larger(ratio, ratio_max);
    loss_sum.add(loss);
    log_ratio_sq_sum.add(log_ratio * log_ratio);
    ratio_sum.add(ratio);
  }
  sums.count += sum_lanes<A>(count);
  sums.loss += loss_sum.total() * weight;
  sums.log_ratio_sq += log_ratio_sq_sum.total();
  sums.clipped += sum_lanes<A>(clipped_count);
  sums.ratio += ratio_sum.total();
  sums.ratio_max = double(max_lanes<A>(ratio_max));
  sums.kl += kl_sum.total();
  sums.entropy += entropy_sum.total();
}

template <class T>
void policy_loss(const PolicyLossArgs& args) {
  const double divisor = denominator(args.tokens, args.sums);
  sweep_blocks(args.tokens, divisor, args.sums,
               [&](PolicySums& sums, int64_t b, int64_t first, int64_t last, double weight) {
                 policy_sweep<T>(args, sums, b, first, last, weight);
               });
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

template <class T>
void value_sweep(const ValueLossArgs& args, ValueSums& sums, int64_t b, int64_t first, int64_t last,
                 double weight) {
  using A = Accumulator<T>;
  using V = Vec<A>;
  const auto row = [&](const Tokens& x) { return row_of<const T>(x, args.tokens.rows, b); };
  const Row<const T> values = row(args.values), old_values = row(args.old_values);
  const Row<const T> returns = row(args.returns);
  const Row<const uint8_t> mask = row_of<const uint8_t>(args.tokens.mask, args.tokens.rows, b);
  const Row<A> grad_values = row_of<A>(args.grad_values, args.tokens.rows, b);
  const A clip_range = A(args.clip_range), token_weight = A(weight);

  // Moments of the returns about one of them, so that a large mean cancels nothing.
  int64_t any_real = first;
  while (mask && any_real < last && !mask[any_real]) ++any_real;
  const A origin = any_real < last ? widen(returns[any_real]) : A(0);

  V count{}, clipped_count{};
  LaneSum<A> loss_sum, value_sum, error_sq_sum, shifted_sum, shifted_sq_sum;
  for (int64_t t = first; t < last; t += kLanes<A>) {
    const Chunk<T> chunk(mask, t, last - t < kLanes<A> ? last - t : kLanes<A>);
    const V value = chunk.load(values), old_value = chunk.load(old_values);
    const V target = chunk.load(returns);

    // max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2) / 2, in a tie the unclipped branch;
    // the clipped one is larger only where the clip holds, so that its derivative is 0.
    const V error = value - target, error_sq = error * error;
    const V clipped = clamp<A>(value, old_value - clip_range, old_value + clip_range) - target;
    const V clipped_sq = clipped * clipped;
    const Truth<A> is_clipped = clipped_sq > error_sq;
    const V loss = (is_clipped ? clipped_sq : error_sq) * A(0.5);
    const V grad = is_clipped ? V{} : error;
    if (grad_values) chunk.store(grad_values, where<A>(chunk.real, grad * token_weight));

    const V shifted = where<A>(chunk.real, target - origin);
    count += where<A>(chunk.real, splat(A(1)));
    clipped_count += where<A>(is_clipped, splat(A(1)));
    loss_sum.add(loss);
    value_sum.add(value);
    error_sq_sum.add(error_sq);
    shifted_sum.add(shifted);
    shifted_sq_sum.add(shifted * shifted);
  }
  const double n = sum_lanes<A>(count);
  sums.count += n;
  sums.loss += loss_sum.total() * weight;
  sums.clipped += sum_lanes<A>(clipped_count);
  sums.value += value_sum.total();
  sums.error_sq += error_sq_sum.total();
  sums.returns = merged(
      sums.returns,
      moments_of(MomentSums{double(origin), n, shifted_sum.total(), shifted_sq_sum.total()}));
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
