// Log-prob of the target y and entropy of softmax(z / T), one row of logits at a time.
//
// The target is kept apart from the other classes, so that nothing cancels where it has nearly all
// of the probability. With S, U over j != y, from one pass, and any M near the largest z_j:
//
//   d_j = (z_j - M) / T,  S = sum e^{d_j},  U = sum e^{d_j} d_j
//
//   a        = (z_y - M) / T - log S              the log-odds of y
//   log p_y  = -softplus(-a),  log(1 - p_y) = -softplus(a)
//   log p_j  = d_j - log_norm,  log_norm = log S + softplus(a)
//   H        = h(p_y) + (1 - p_y) (log S - U / S),  h(p) = -p log p - (1 - p) log(1 - p)
//
// The last line is the chain rule of entropy: which of y and the rest, then which of the rest.
// Backward, from the saved M, log_norm, H and log p_y, for gradients g of log p_y and g_H of H:
//
//   dz_j = -p_j (g + g_H (log p_j + H)) / T,  and g / T more at j = y
//
// With a softcap c, z_j = c tanh(x_j / c) of the logits x_j that are read, and
// dx_j = dz_j (1 - (z_j / c)^2).
#include <cmath>

#include "online_sums.h"
#include "threads.h"

namespace ppo::PPO_ISA {
namespace {

constexpr int64_t kIgnored = -100;

double softplus(double x) { return x > 0 ? x + std::log1p(std::exp(-x)) : std::log1p(std::exp(x)); }

// -p log p, given log p.
double surprise(double log_p) { return log_p < -745 ? 0 : -std::exp(log_p) * log_p; }

template <class T, bool kEntropy, bool kCapped>
void forward(const LogprobForward& args) {
  using A = Accumulator<T>;
  A* logprobs = static_cast<A*>(args.logprobs);
  A* entropies = static_cast<A*>(args.entropy);
  const auto keep = [&](int64_t i, double shift, double log_norm) {
    if (args.state == nullptr) return;
    static_cast<A*>(args.state)[i] = A(shift);
    static_cast<A*>(args.state)[args.count + i] = A(log_norm);
  };
  const int64_t vocab = args.logits.vocab;
  const bool last = args.first_class + vocab == args.classes;

  parallel_for(args.count, args.threads, [&](int64_t i) {
    const int64_t y = args.targets[i] - args.first_class;
    if (args.targets[i] == kIgnored) {
      logprobs[i] = 0;
      if (kEntropy) entropies[i] = 0;
      return keep(i, 0, 0);
    }
    const T* z = logits_row<const T>(args.logits, i);
    const RowSums none{-kInfinity<double>, 0, 0, 0};
    const RowSums so_far = args.first_class > 0 ? args.sums[i] : none;
    OnlineSums<T, kEntropy, kCapped> others(args.temperature, args.softcap, so_far);
    others.add_others(z, vocab, y);
    const bool here = y >= 0 && y < vocab;
    const RowSums sums = others.result(
        here ? double(capped_one<kCapped, A>(widen(z[y]), A(args.softcap))) : so_far.target);
    if (!last) {
      args.sums[i] = sums;
      return;
    }

    const double shift = others.shift == -kInfinity<A> ? 0 : sums.shift;
    const double log_sum = std::log(sums.sum);
    const double log_odds = (sums.target - shift) / args.temperature - log_sum;
    const double log_p = -softplus(-log_odds), log_rest = -softplus(log_odds);
    logprobs[i] = A(log_p);
    // Where y is the only possible class, any finite number does: the others' e^{d} is 0.
    keep(i, shift, sums.sum == 0 ? 0 : log_sum - log_rest);
    if (kEntropy) {
      const double mean_d = sums.dot / sums.sum / args.temperature;
      const double rest = sums.sum == 0 ? 0 : log_sum - mean_d;
      entropies[i] = A(surprise(log_p) + surprise(log_rest) + std::exp(log_rest) * rest);
    }
  });
}

template <class T, bool kCapped>
void backward(const LogprobBackward& args) {
  using A = Accumulator<T>;
  const A* grad_logprobs = static_cast<const A*>(args.grad_logprobs);
  const A* grad_entropy = static_cast<const A*>(args.grad_entropy);
  const A* logprobs = static_cast<const A*>(args.logprobs);
  const A* shifts = static_cast<const A*>(args.state);
  const A* log_norms = shifts + args.count;
  const A* entropies = static_cast<const A*>(args.entropy);
  const int64_t vocab = args.logits.vocab;

  parallel_for(args.count, args.threads, [&](int64_t i) {
    T* dz = static_cast<T*>(args.grad_logits) + i * vocab;
    const int64_t y = args.targets[i];
    const A g = grad_logprobs ? grad_logprobs[i] : A(0);
    const A g_entropy = grad_entropy ? grad_entropy[i] : A(0);
    if (y == kIgnored || (g == 0 && g_entropy == 0)) {
      std::memset(static_cast<void*>(dz), 0, size_t(vocab) * sizeof(T));
      return;
    }
    const T* z = logits_row<const T>(args.logits, i);
    const A entropy = grad_entropy ? entropies[i] : A(0);
    const Vec<A> shift = splat(shifts[i]);
    const double norm = log_norms[i] * kLog2E, r = std::nearbyint(norm < 1000 ? norm : 1000);
    const Exp2<A> power(A(kLog2E / args.temperature), A(r));
    const double k = std::exp2(r - norm) / args.temperature;
    const A constant = A(-(g + double(g_entropy) * (double(entropy) - log_norms[i])) * k);
    const A slope = A(-double(g_entropy) * k / args.temperature);
    const A cap = A(args.softcap);
    const auto uncapped = [&](auto z) {  // dz / dx
      return A(1) - (z * (1 / cap)) * (z * (1 / cap));
    };
    const auto gradient = [&](Vec<A> x) {
      const Vec<A> z = capped<kCapped>(x, cap), d = larger(power.at_least(), z - shift);
      const Vec<A> dz = power(d) * (constant + slope * d);
      return kCapped ? dz * uncapped(z) : dz;
    };
    const A factor_at_target = kCapped ? uncapped(capped_one<kCapped, A>(widen(z[y]), cap)) : A(1);
    int64_t j = 0;
    for (; j + 2 * kLanes<A> <= vocab; j += 2 * kLanes<A>) {
      Vec<A> a, b;
      load_two(z + j, a, b);
      store_two(dz + j, gradient(a), gradient(b));
    }
    if (j + kLanes<A> <= vocab) {
      store(dz + j, gradient(load(z + j)));
      j += kLanes<A>;
    }
    if (j < vocab) store_first(dz + j, vocab - j, gradient(load_first(z + j, vocab - j)));

    // At y from log p_y itself: 1 - p_y = -expm1(log p_y) keeps its digits where p_y is near 1.
    const double log_p = logprobs[i];
    double at_target = -g * std::expm1(log_p);
    if (g_entropy != 0 && log_p > -745) {
      at_target -= g_entropy * std::exp(log_p) * (log_p + entropy);
    }
    narrow(A(at_target / args.temperature * factor_at_target), dz[y]);
  });
}

}  // namespace

void token_logprobs(const LogprobForward& args) {
  with_dtype(args.logits.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (std::isfinite(args.softcap)) return forward<T, true, true>(args);
    return args.entropy ? forward<T, true, false>(args) : forward<T, false, false>(args);
  });
}

void token_logprobs_backward(const LogprobBackward& args) {
  with_dtype(args.logits.dtype, [&](auto zero) {
    using T = decltype(zero);
    return std::isfinite(args.softcap) ? backward<T, true>(args) : backward<T, false>(args);
  });
}

}  // namespace ppo::PPO_ISA
