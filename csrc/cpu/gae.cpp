// Generalized advantage estimation (Schulman et al. 2016, arXiv:1506.02438), with given rewards or
// with KL-shaped ones (Ouyang et al. 2022). One reverse pass over each sequence:
//
//   delta_t = r_t + gamma V_{t+1} - V_t
//   A_t     = delta_t + gamma lam A_{t+1}
//   R_t     = A_t + V_t
//
// where t+1 is the next real token; masked ones are skipped, and nothing of theirs is read. The
// recursion runs in double for every dtype: it costs no time beside the memory, and the rounding
// errors of a long sequence do not pile up.
#include <cmath>

#include "threads.h"
#include "tokens.h"

namespace ppo::PPO_ISA {
namespace {

// r_t as given.
template <class T>
struct GivenRewards {
  Row<const T> rewards;

  GivenRewards(const GaeArgs& args, int64_t b)
      : rewards(row_of<const T>(args.rewards, args.rows, b)) {}

  double operator()(int64_t t, bool) { return widen(rewards[t]); }
  double kl() const { return 0; }
};

// r_t = -kl_coef k_t, plus the sequence's score on its last real token (the first one met).
template <class T, KL kEstimator>
struct ShapedRewards {
  Row<const T> scores, logprobs, ref_logprobs;
  double kl_coef;
  double kl_sum = 0;

  ShapedRewards(const GaeArgs& args, int64_t b)
      : scores(row_of<const T>(args.scores, args.rows, b)),
        logprobs(row_of<const T>(args.logprobs, args.rows, b)),
        ref_logprobs(row_of<const T>(args.ref_logprobs, args.rows, b)),
        kl_coef(args.kl_coef) {}

  double operator()(int64_t t, bool is_last) {
    const double k = estimate(double(widen(logprobs[t])) - double(widen(ref_logprobs[t])));
    kl_sum += k;
    return -kl_coef * k + (is_last ? double(widen(scores[0])) : 0.0);
  }
  double kl() const { return kl_sum; }

 private:
  // Schulman 2020, joschu.net/blog/kl-approx.html; k3 with the log-ratio clamped as in the loss.
  static double estimate(double log_ratio) {
    if (kEstimator == KL::k1) return log_ratio;
    if (kEstimator == KL::k2) return log_ratio * log_ratio / 2;
    const double bounded = log_ratio < -20 ? -20 : log_ratio > 20 ? 20 : log_ratio;
    return std::expm1(-bounded) + bounded;
  }
};

// One sequence, from its end.
template <class T, class Rewards>
void gae_row(const GaeArgs& args, int64_t b, MomentSums& sums) {
  using A = Accumulator<T>;
  const Row<const T> values = row_of<const T>(args.values, args.rows, b);
  const Row<const uint8_t> mask = row_of<const uint8_t>(args.mask, args.rows, b);
  const Row<const T> bootstrap = row_of<const T>(args.bootstrap, args.rows, b);
  const Row<A> advantages = row_of<A>(args.advantages, args.rows, b);
  const Row<A> returns = row_of<A>(args.returns, args.rows, b);
  const double gamma = args.gamma, gamma_lam = args.gamma * args.lam;
  const bool want_moments = args.moments != nullptr;

  Rewards rewards(args, b);
  double next_value = 0, next_advantage = 0;
  bool is_last = true;
  for (int64_t t = row_size(args.rows, b) - 1; t >= 0; --t) {
    if (mask && !mask[t]) {
      advantages[t] = returns[t] = 0;
      continue;
    }
    if (is_last && bootstrap) next_value = widen(bootstrap[0]);
    const double value = widen(values[t]);
    const double delta = rewards(t, is_last) + gamma * next_value - value;
    const double advantage = delta + gamma_lam * next_advantage;
    advantages[t] = A(advantage);
    returns[t] = A(advantage + value);
    if (want_moments) sums.add(advantage);
    next_value = value;
    next_advantage = advantage;
    is_last = false;
  }
  if (args.kl.data) row_of<A>(args.kl, args.rows, b)[0] = A(rewards.kl());
}

template <class T, class Rewards>
void gae_rows(const GaeArgs& args) {
  const int64_t count = args.rows.count, per_block = args.rows_per_block;
  const int64_t blocks = (count + per_block - 1) / per_block;
  parallel_for(blocks, args.threads, [&](int64_t block) {
    const int64_t first = block * per_block;
    const int64_t last = first + per_block < count ? first + per_block : count;
    Moments moments{0, 0, 0};
    for (int64_t b = first; b < last; ++b) {
      MomentSums sums;
      gae_row<T, Rewards>(args, b, sums);
      moments = merged(moments, moments_of(sums));
    }
    if (args.moments) args.moments[block] = moments;
  });
  for (int64_t block = 1; args.moments && block < blocks; ++block) {
    args.moments[0] = merged(args.moments[0], args.moments[block]);
  }
}

}  // namespace

void gae(const GaeArgs& args) {
  with_dtype(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    switch (args.kl_estimator) {
      case KL::none: return gae_rows<T, GivenRewards<T>>(args);
      case KL::k1: return gae_rows<T, ShapedRewards<T, KL::k1>>(args);
      case KL::k2: return gae_rows<T, ShapedRewards<T, KL::k2>>(args);
      case KL::k3: return gae_rows<T, ShapedRewards<T, KL::k3>>(args);
    }
  });
}

}  // namespace ppo::PPO_ISA
