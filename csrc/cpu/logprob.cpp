// Log-prob of the target y and entropy of softmax(z / T), one row of logits at a time.
//
// The target is kept apart from the other classes, so that nothing cancels where it has nearly all
// of the probability. With M, S, U over j != y, from one pass (M is the running maximum):
//
//   M = max z_j,  d_j = (z_j - M) / T,  S = sum e^{d_j},  U = sum e^{d_j} d_j
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
#include <cmath>

#include "simd.h"
#include "threads.h"

namespace ppo::PPO_ISA {
namespace {

constexpr int64_t kIgnored = -100;
constexpr int kBlockBytes = 8192;  // read from memory once, and again from the L1 cache

template <class A>
constexpr A kInfinity = A(__builtin_huge_val());

// Row i of the logits, whose leading dimensions may have any strides.
template <class T>
T* logits_row(const LogitRows& logits, int64_t i) {
  int64_t offset = 0;
  for (int d = logits.dims - 1; d >= 0; --d) {
    offset += (i % logits.shape[d]) * logits.strides[d];
    i /= logits.shape[d];
  }
  return static_cast<T*>(logits.data) + offset;
}

// M, S and U of the classes seen so far.
template <class T, bool kEntropy, class A = Accumulator<T>>
struct OnlineSums {
  A inv_temperature;
  A max = -kInfinity<A>;
  double sum = 0, dot = 0;

  void add(const T* z, int64_t n) {
    constexpr int64_t block = kBlockBytes / sizeof(T);
    for (; n > block; z += block, n -= block) add_block(z, block);
    if (n > 0) add_block(z, n);
  }

 private:
  static constexpr int64_t kWidth = kLanes<A>;
  static constexpr int kUnroll = 4;  // independent sums, to hide the latency of each

  void add_block(const T* z, int64_t n) {
    raise_max(block_max(z, n));
    // Without any finite logit yet, 0 does for M: -inf gives e^{d} = 0, NaN stays NaN.
    const Vec<A> shift = splat(max == -kInfinity<A> ? A(0) : max);
    Vec<A> sums[kUnroll] = {}, dots[kUnroll] = {};
    const auto add_vector = [&](Vec<A> x, int k) {
      const Vec<A> d = clamp_low<A>((x - shift) * inv_temperature);
      const Vec<A> e = exp_bounded<A>(d);
      sums[k] += e;
      if (kEntropy) dots[k] += e * d;
    };
    int64_t i = 0;
    for (; i + kUnroll * kWidth <= n; i += kUnroll * kWidth) {
      for (int k = 0; k < kUnroll; ++k) add_vector(load(z + i + k * kWidth), k);
    }
    for (; i + kWidth <= n; i += kWidth) add_vector(load(z + i), 0);
    if (i < n) add_vector(load_first(z + i, n - i, -kInfinity<A>), 0);
    sum += sum_lanes<A>((sums[0] + sums[1]) + (sums[2] + sums[3]));
    if (kEntropy) dot += sum_lanes<A>((dots[0] + dots[1]) + (dots[2] + dots[3]));
  }

  static A block_max(const T* z, int64_t n) {
    Vec<A> maxima[kUnroll];
    for (Vec<A>& m : maxima) m = splat(-kInfinity<A>);
    int64_t i = 0;
    for (; i + kUnroll * kWidth <= n; i += kUnroll * kWidth) {
      for (int k = 0; k < kUnroll; ++k) {
        maxima[k] = larger(load(z + i + k * kWidth), maxima[k]);
      }
    }
    for (; i + kWidth <= n; i += kWidth) maxima[0] = larger(load(z + i), maxima[0]);
    if (i < n) maxima[0] = larger(load_first(z + i, n - i, -kInfinity<A>), maxima[0]);
    return max_lanes<A>(larger(larger(maxima[0], maxima[1]), larger(maxima[2], maxima[3])));
  }

  // Every d_j grows by (M - M') / T, which is negative.
  void raise_max(A to) {
    if (!(to > max)) return;
    if (max != -kInfinity<A>) {
      const double delta = (double(max) - double(to)) * double(inv_temperature);
      const double factor = std::exp(delta);
      dot = factor == 0 ? 0 : factor * (dot + delta * sum);
      sum *= factor;
    }
    max = to;
  }
};

double softplus(double x) { return x > 0 ? x + std::log1p(std::exp(-x)) : std::log1p(std::exp(x)); }

// -p log p, given log p.
double surprise(double log_p) { return log_p < -745 ? 0 : -std::exp(log_p) * log_p; }

template <class T, bool kEntropy>
void forward(const LogprobForward& args) {
  using A = Accumulator<T>;
  A* logprobs = static_cast<A*>(args.logprobs);
  A* maxima = static_cast<A*>(args.state);
  A* log_norms = maxima + args.count;
  A* entropies = static_cast<A*>(args.entropy);

  parallel_for(args.count, args.threads, [&](int64_t i) {
    const int64_t y = args.targets[i];
    if (y == kIgnored) {
      logprobs[i] = maxima[i] = log_norms[i] = 0;
      if (kEntropy) entropies[i] = 0;
      return;
    }
    const T* z = logits_row<const T>(args.logits, i);
    OnlineSums<T, kEntropy> others{A(1 / args.temperature)};
    others.add(z, y);
    others.add(z + y + 1, args.logits.vocab - y - 1);

    const double shift = others.max == -kInfinity<A> ? 0 : double(others.max);
    const double log_sum = std::log(others.sum);
    const double log_odds = (double(widen(z[y])) - shift) / args.temperature - log_sum;
    const double log_p = -softplus(-log_odds), log_rest = -softplus(log_odds);
    logprobs[i] = A(log_p);
    maxima[i] = A(shift);
    // Where y is the only possible class, any finite number does: the others' e^{d} is 0.
    log_norms[i] = others.sum == 0 ? A(0) : A(log_sum - log_rest);
    if (kEntropy) {
      const double rest = others.sum == 0 ? 0 : log_sum - others.dot / others.sum;
      entropies[i] = A(surprise(log_p) + surprise(log_rest) + std::exp(log_rest) * rest);
    }
  });
}

template <class T>
void backward(const LogprobBackward& args) {
  using A = Accumulator<T>;
  const A* grad_logprobs = static_cast<const A*>(args.grad_logprobs);
  const A* grad_entropy = static_cast<const A*>(args.grad_entropy);
  const A* logprobs = static_cast<const A*>(args.logprobs);
  const A* maxima = static_cast<const A*>(args.state);
  const A* log_norms = maxima + args.count;
  const A* entropies = static_cast<const A*>(args.entropy);
  const int64_t vocab = args.logits.vocab;
  const A inv_temperature = A(1 / args.temperature);

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
    const auto gradient = [&](Vec<A> x) {
      const Vec<A> log_p = clamp_low<A>((x - maxima[i]) * inv_temperature - log_norms[i]);
      const Vec<A> p = exp_bounded<A>(log_p > A(0) ? Vec<A>{} : log_p);
      return -p * (g + g_entropy * (log_p + entropy)) * inv_temperature;
    };
    int64_t j = 0;
    for (; j + kLanes<A> <= vocab; j += kLanes<A>) store(dz + j, gradient(load(z + j)));
    if (j < vocab) store_first(dz + j, vocab - j, gradient(load_first(z + j, vocab - j, A(0))));

    // At y from log p_y itself: 1 - p_y = -expm1(log p_y) keeps its digits where p_y is near 1.
    const double log_p = logprobs[i];
    double at_target = -g * std::expm1(log_p);
    if (g_entropy != 0 && log_p > -745) {
      at_target -= g_entropy * std::exp(log_p) * (log_p + entropy);
    }
    narrow(A(at_target / args.temperature), dz[y]);
  });
}

}  // namespace

void token_logprobs(const LogprobForward& args) {
  with_dtype(args.logits.dtype, [&](auto zero) {
    using T = decltype(zero);
    return args.entropy ? forward<T, true>(args) : forward<T, false>(args);
  });
}

void token_logprobs_backward(const LogprobBackward& args) {
  with_dtype(args.logits.dtype, [&](auto zero) { backward<decltype(zero)>(args); });
}

}  // namespace ppo::PPO_ISA
