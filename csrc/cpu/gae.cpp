// Generalized advantage estimation (Schulman et al. 2016, arXiv:1506.02438), with given rewards or
// with KL-shaped ones (Ouyang et al. 2022). One reverse pass over each sequence:
//
//   delta_t = r_t + gamma V_{t+1} - V_t
//   A_t     = delta_t + gamma lam A_{t+1}
//   R_t     = A_t + V_t
//
// where t+1 is the next real token; masked ones are skipped, and nothing of theirs is read. All that
// a token needs from its right is one number, the carry:
//
//   A_t = r_t - V_t + c_{t+1},   c_t = gamma V_t + gamma lam A_t,
//
// and at the end of a sequence c = gamma bootstrap + score. The recursion runs in double for every
// dtype, so that the rounding errors of a long sequence do not accumulate.
#include <sched.h>

#include <cfloat>
#include <cmath>

#include "doubles.h"
#include "exp.h"
#include "threads.h"

namespace ppo::PPO_ISA {
namespace {

constexpr int kStep = 8;  // tokens whose mask is tested at once
constexpr uint64_t kAllReal = 0x0101010101010101, kMixed = 1;
static_assert(kStep % kDoubles == 0);

struct Discounts {
  double gamma, gamma_lam;
  Doubles power[kDoubles + 1];  // (gamma lam)^i in every lane
  Doubles to_end;               // (gamma lam)^(kDoubles - 1 - lane)

  explicit Discounts(const GaeArgs& args) : gamma(args.gamma), gamma_lam(args.gamma * args.lam) {
    double p = 1;
    for (int i = 0; i < kDoubles; ++i) {
      power[i] = splat(p);
      to_end[kDoubles - 1 - i] = p;
      p *= gamma_lam;
    }
    power[kDoubles] = splat(p);
  }

  // (gamma lam)^n, but not 0 for a large n: times an infinite carry, that would be NaN.
  double after(int64_t n) const {
    const double p = std::pow(gamma_lam, double(n));
    return p == 0 && gamma_lam > 0 ? DBL_MIN : p;
  }
};

// r_t as given.
template <class T>
struct GivenRewards {
  static constexpr bool kShaped = false;
  Row<const T> rewards;

  GivenRewards(const GaeArgs& args, int64_t b)
      : rewards(row_of<const T>(args.rewards, args.rows, b)) {}

  template <class X>
  X at(int64_t t) { return read<X>(rewards, t); }
  bool contiguous() const { return rewards.stride == 1; }
  double at_end() const { return 0; }
  double kl() const { return 0; }
};

// r_t = -kl_coef k_t, plus the score at the end.
template <class T, KL kEstimator>
struct ShapedRewards {
  static constexpr bool kShaped = true;
  Row<const T> scores, logprobs, ref_logprobs;
  double kl_coef;
  Sum kl_sum;

  ShapedRewards(const GaeArgs& args, int64_t b)
      : scores(row_of<const T>(args.scores, args.rows, b)),
        logprobs(row_of<const T>(args.logprobs, args.rows, b)),
        ref_logprobs(row_of<const T>(args.ref_logprobs, args.rows, b)),
        kl_coef(args.kl_coef) {}

  template <class X>
  X at(int64_t t) {
    const X k = estimate(read<X>(logprobs, t) - read<X>(ref_logprobs, t));
    kl_sum.add(k);
    return -kl_coef * k;
  }
  bool contiguous() const { return logprobs.stride == 1 && ref_logprobs.stride == 1; }
  double at_end() const { return widen(scores[0]); }
  double kl() const { return kl_sum.total(); }

 private:
  // Schulman 2020, joschu.net/blog/kl-approx.html; k3 with the log-ratio clamped as in the loss.
  static Doubles estimate(Doubles log_ratio) {
    if (kEstimator == KL::k1) return log_ratio;
    if (kEstimator == KL::k2) return log_ratio * log_ratio / 2;
    const Doubles low = splat(-20.0), high = splat(20.0);
    Doubles bounded = log_ratio < low ? low : log_ratio;
    bounded = bounded > high ? high : bounded;
    return expm1_bounded<double>(-bounded) + bounded;
  }
  static double estimate(double log_ratio) { return estimate(splat(log_ratio))[0]; }
};

// What a sweep does with each token: it stores the results,
template <class T, bool kMoments>
struct Store {
  Row<Accumulator<T>> advantages, returns;
  MomentLanes* moments;

  template <class X>
  void real(int64_t t, X value, X advantage) {
    write(advantages, t, advantage);
    write(returns, t, X(advantage + value));
    if (kMoments) moments->add(advantage);
  }
  void masked(int64_t t) { advantages[t] = returns[t] = 0; }
  void masked_step(int64_t t) {
    for (int i = 0; i < kStep; i += kDoubles) {
      write(advantages, t + i, Doubles{});
      write(returns, t + i, Doubles{});
    }
  }
};

// or nothing.
struct Nowhere {
  template <class X>
  void real(int64_t, X, X) {}
  void masked(int64_t) {}
  void masked_step(int64_t) {}
};

// What a token takes from its right; and what of that comes from its own chunk.
template <class X>
struct Carry {
  X full, own;
};

template <class T, class Rewards>
struct Sequence {
  const Discounts discounts;
  Row<const T> values, bootstrap;
  Row<const uint8_t> mask;
  Rewards rewards;
  bool contiguous;

  Sequence(const GaeArgs& args, const Discounts& discounts, int64_t b)
      : discounts(discounts),
        values(row_of<const T>(args.values, args.rows, b)),
        bootstrap(row_of<const T>(args.bootstrap, args.rows, b)),
        mask(row_of<const uint8_t>(args.mask, args.rows, b)),
        rewards(args, b),
        contiguous(values.stride == 1 && (!mask || mask.stride == 1) && rewards.contiguous()) {}

  double carry_at_end() const {
    return rewards.at_end() + (bootstrap ? discounts.gamma * widen(bootstrap[0]) : 0.0);
  }

  // Tokens [begin, end), from the end; takes the carry of token `end` and leaves that of `begin`;
  // with kOwn also what that would be if the first were 0. Returns how many of them are real.
  template <bool kOwn, class Out>
  int64_t sweep(int64_t begin, int64_t end, Carry<double>& carry, Out& out) {
    int64_t real_tokens = 0;
    for (int64_t t = end; t > begin;) {
      const uint64_t real = next_step(begin, t);
      if (real == kAllReal) {
        Carry<Doubles> carries{splat(carry.full), splat(carry.own)};
        real_tokens += t;
        do {
          for (int i = 0; i < kStep; i += kDoubles) vector<kOwn>(t -= kDoubles, carries, out);
        } while (next_step(begin, t) == kAllReal);
        carry = {carries.full[0], carries.own[0]};
        real_tokens -= t;
      } else if (real == 0) {
        out.masked_step(t -= kStep);
      } else if (--t, mask && !mask[t]) {
        out.masked(t);
      } else {
        token<kOwn>(t, carry, out);
        real_tokens += 1;
      }
    }
    return real_tokens;
  }

 private:
  // The mask of the kStep tokens that end at t; kMixed also where there are fewer.
  uint64_t next_step(int64_t begin, int64_t t) const {
    if (!contiguous || t - begin < kStep) return kMixed;
    return mask ? load_bits<uint64_t>(mask.data + t - kStep) : kAllReal;
  }

  // A_t = r_t - V_t + c_{t+1},  c_t = gamma V_t + gamma lam A_t.
  template <bool kOwn, class Out>
  void token(int64_t t, Carry<double>& carry, Out& out) {
    const double value = read<double>(values, t);
    const double known = rewards.template at<double>(t) - value, advantage = known + carry.full;
    out.real(t, value, advantage);
    carry.full = discounts.gamma * value + discounts.gamma_lam * advantage;
    if (kOwn) carry.own = discounts.gamma * value + discounts.gamma_lam * (known + carry.own);
  }

  // The same for kDoubles tokens from t on: lane i first sums what lanes i, i + 1, ... contribute,
  // in log2(kDoubles) steps, then takes the carry, which only crosses from vector to vector.
  template <bool kOwn, class Out>
  void vector(int64_t t, Carry<Doubles>& carry, Out& out) {
    const Doubles* power = discounts.power;
    const Doubles value = read<Doubles>(values, t);
    Doubles sums = rewards.template at<Doubles>(t) - value + discounts.gamma * shifted<1>(value);
    if constexpr (kDoubles > 1) sums += power[1] * shifted<1>(sums);
    if constexpr (kDoubles > 2) sums += power[2] * shifted<2>(sums);
    if constexpr (kDoubles > 4) sums += power[4] * shifted<4>(sums);
    out.real(t, value, Doubles(sums + discounts.to_end * carry.full));
    sums = first_everywhere(discounts.gamma * value + power[1] * sums);
    carry.full = sums + power[kDoubles] * carry.full;
    if (kOwn) carry.own = sums + power[kDoubles] * carry.own;
  }
};

template <class T, class Rewards>
Store<T, Rewards::kShaped> results_of(const GaeArgs& args, int64_t b, MomentLanes& moments) {
  using A = Accumulator<T>;
  return {row_of<A>(args.advantages, args.rows, b), row_of<A>(args.returns, args.rows, b),
          &moments};
}

template <class T>
void store_kl(const GaeArgs& args, int64_t b, double kl) {
  using A = Accumulator<T>;
  if (args.kl.data) row_of<A>(args.kl, args.rows, b)[0] = A(kl);
}

template <class T, class Rewards>
void whole_rows(const GaeArgs& args, const Discounts& discounts, GaePiece& piece) {
  MomentLanes moments;
  // The last row first: memory is traversed in one direction, which the processor prefetches.
  for (int64_t b = piece.row + piece.rows; b-- > piece.row;) {
    Sequence<T, Rewards> sequence(args, discounts, b);
    auto results = results_of<T, Rewards>(args, b, moments);
    Carry<double> carry{sequence.carry_at_end(), 0};
    sequence.template sweep<false>(0, row_size(args.rows, b), carry, results);
    store_kl<T>(args, b, sequence.rewards.kl());
  }
  piece.moments = moments_of(moments.total());
}

bool has_handed_on(const GaePiece& piece) {
  return __atomic_load_n(&piece.handed_on, __ATOMIC_ACQUIRE);
}

// A chunk of a long row takes the carry of the chunk to its right, and passes on
//   c_begin = (c_begin for c_end = 0) + (gamma lam)^n c_end,   with n real tokens.
// Where it would have to wait (for another thread, which has begun that chunk), it first computes
// what it adds itself, so that the next one waits less, and makes its results from the inputs that
// are now in the cache. Else one sweep does both; the bits are the same.
template <class T, class Rewards>
void chunk(const GaeArgs& args, const Discounts& discounts, GaePiece& piece) {
  Sequence<T, Rewards> sequence(args, discounts, piece.row);
  MomentLanes moments;
  auto results = results_of<T, Rewards>(args, piece.row, moments);
  const GaePiece* right = piece.right < 0 ? nullptr : &args.pieces[piece.right];
  const bool waits = right != nullptr && !has_handed_on(*right);
  Carry<double> carry{0, 0};
  int64_t real_tokens = 0;
  if (waits) {
    Nowhere nowhere;
    real_tokens = sequence.template sweep<false>(piece.begin, piece.end, carry, nowhere);
    carry.own = carry.full;
    while (!has_handed_on(*right)) sched_yield();
  }
  const double given = right == nullptr ? sequence.carry_at_end() : right->carry;
  carry.full = given;
  if (!waits) real_tokens = sequence.template sweep<true>(piece.begin, piece.end, carry, results);
  piece.carry = carry.own + discounts.after(real_tokens) * given;
  piece.kl = (right == nullptr ? 0 : right->kl) + sequence.rewards.kl();
  __atomic_store_n(&piece.handed_on, true, __ATOMIC_RELEASE);
  if (piece.begin == 0) store_kl<T>(args, piece.row, piece.kl);
  if (waits) sequence.template sweep<false>(piece.begin, piece.end, carry, results);
  piece.moments = moments_of(moments.total());
}

template <class T, class Rewards>
void gae_pieces(const GaeArgs& args) {
  const Discounts discounts(args);
  parallel_for(args.piece_count, args.threads, [&](int64_t i) {
    GaePiece& piece = args.pieces[i];
    if (piece.is_chunk) {
      chunk<T, Rewards>(args, discounts, piece);
    } else {
      whole_rows<T, Rewards>(args, discounts, piece);
    }
  });
  Moments all{0, 0, 0};
  for (int64_t i = 0; i < args.piece_count; ++i) all = merged(all, args.pieces[i].moments);
  *args.moments = all;
}

}  // namespace

void gae(const GaeArgs& args) {
  with_dtype(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    switch (args.kl_estimator) {
      case KL::none: return gae_pieces<T, GivenRewards<T>>(args);
      case KL::k1: return gae_pieces<T, ShapedRewards<T, KL::k1>>(args);
      case KL::k2: return gae_pieces<T, ShapedRewards<T, KL::k2>>(args);
      case KL::k3: return gae_pieces<T, ShapedRewards<T, KL::k3>>(args);
    }
  });
}

}  // namespace ppo::PPO_ISA
