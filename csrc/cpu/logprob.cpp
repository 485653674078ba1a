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

#include "exp.h"
#include "threads.h"

namespace ppo::PPO_ISA {
namespace {

constexpr int64_t kIgnored = -100;
constexpr double kLog2E = 1.4426950408889634074, kLn2 = 0.69314718055994530942;

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

// Rows are taken in blocks: read from memory for the maximum, and again from the L1 cache.
constexpr int kBlockBytes = 2048;
constexpr int kPrefetchBytes = 4096;  // how far ahead
constexpr double kExp2Far = 1 << 21;
template <class T> constexpr int64_t kBlock = kBlockBytes / sizeof(T);
template <class T> constexpr int64_t kStep = 4 * kLanes<Accumulator<T>>;  // divides kBlock

// The processor itself would not look beyond a page, nor start before it meets the block.
template <int kBytes>
inline void prefetch_after(const void* p) {
  for (int b = 0; b < kBytes; b += 64) {
    __builtin_prefetch(static_cast<const char*>(p) + kPrefetchBytes + b);
  }
}

// The largest of n numbers, a multiple of kStep; where one is NaN, any number.
template <class A>
A block_max(const A* z, int64_t n) {
  Vec<A> maxima[4];
  for (Vec<A>& m : maxima) m = splat(-kInfinity<A>);
  for (int64_t i = 0; i < n; i += kStep<A>) {
    for (int k = 0; k < 4; ++k) maxima[k] = larger(maxima[k], load(z + i + k * kLanes<A>));
  }
  return max_lanes<A>(larger(larger(maxima[0], maxima[1]), larger(maxima[2], maxima[3])));
}

// The same of half precision, not widened: as signed integers, the bits of numbers from 0 up are in
// order and above those of all negative numbers, of which the largest has the smallest bits.
template <class Half>
float block_max_of_halves(const Half* z, int64_t n) {
  constexpr int lanes = kVectorBytes / 2;
  static_assert(kStep<Half> == 2 * lanes);
  const auto extreme = [&](const auto& better) {
    Shorts best[2] = {load_bits<Shorts>(z), load_bits<Shorts>(z + lanes)};
    for (int64_t i = kStep<Half>; i < n; i += kStep<Half>) {
      for (int k = 0; k < 2; ++k) best[k] = better(best[k], load_bits<Shorts>(z + i + k * lanes));
    }
    const Shorts lane = better(best[0], best[1]);
    int16_t bits = lane[0];
    for (int k = 1; k < lanes; ++k) bits = better(bits, lane[k]);
    return bits;
  };
  int16_t bits = extreme([](auto a, auto b) { return a > b ? a : b; });
  if (bits < 0) bits = extreme([](auto a, auto b) { return a < b ? a : b; });
  return widen(Half{uint16_t(bits)});
}
float block_max(const bf16* z, int64_t n) { return block_max_of_halves(z, n); }
float block_max(const f16* z, int64_t n) { return block_max_of_halves(z, n); }

// M, S and U of the classes seen so far; U without the 1 / T: sum e^{d_j} (z_j - M).
//
// Exponents are in base 2: e^{d_j} = 2^{c (z_j - M)}, c = log2(e) / T. Where c z_j is not too far from
// 0, the subtraction is left to the exponent of the result: 2^{c z_j - R}, R the integer next to c M.
template <class T, bool kEntropy, class A = Accumulator<T>>
class OnlineSums {
 public:
  A max = -kInfinity<A>;
  double sum = 0, dot = 0;

  explicit OnlineSums(double temperature) : c(A(kLog2E / temperature)) {}

  // All classes of a row but the target, which is as if it had no probability.
  void add_others(const T* z, int64_t vocab, int64_t target) {
    T copy[kBlock<T>];
    for (int64_t at = 0; at < vocab; at += kBlock<T>) {
      const int64_t n = vocab - at < kBlock<T> ? vocab - at : kBlock<T>;
      const bool has_target = at <= target && target < at + n;
      if (n == kBlock<T> && !has_target) {
        add_block(z + at, n, z + at);
        continue;
      }
      const int64_t padded = (n + kStep<T> - 1) / kStep<T> * kStep<T>;
      std::memcpy(copy, z + at, size_t(n) * sizeof(T));
      for (int64_t i = n; i < padded; ++i) narrow(-kInfinity<A>, copy[i]);
      if (has_target) narrow(-kInfinity<A>, copy[target - at]);
      add_block(copy, padded, z + at);
    }
  }

 private:
  const A c;
  double r = 0;           // R
  double correction = 1;  // 2^{R - c M}

  // n is a multiple of kStep; `ahead` is where the block lies in memory.
  __attribute__((noinline)) void add_block(const T* z, int64_t n, const T* ahead) {
    raise_max(block_max(z, n));
    // Without any finite logit yet, 0 does for M: -inf gives 2^y = 0, NaN stays NaN.
    const A m = max == -kInfinity<A> ? A(0) : max;
    const bool near = kFused && !kEntropy && std::fabs(c * m) < kExp2Far;
    if (near) {
      const Vec<A> scale = splat(c), lowest = splat(A(r - kExp2Bias<A>) / c);
      const Vec<A> round = splat(kExp2Round<A> - A(r));
      double block_sum = 0;
      const auto term = [&](Vec<A> x, Vec<A>& sum, Vec<A>&) {
        sum += exp2_product<A>(larger(lowest, x), scale, round);
      };
      add_terms(z, n, ahead, term, block_sum, dot);
      sum += block_sum * correction;
    } else {
      const Vec<A> shift = splat(m), scale = splat(-c), farthest = splat(kExp2Bias<A> / c);
      const Vec<A> round = splat(kExp2Round<A>);
      const auto term = [&](Vec<A> x, Vec<A>& sum, Vec<A>& dot) {
        const Vec<A> below = smaller(farthest, shift - x);  // M - z_j
        const Vec<A> e = exp2_product<A>(below, scale, round);
        sum += e;
        if (kEntropy) dot -= e * below;
      };
      add_terms(z, n, ahead, term, sum, dot);
    }
  }

  template <class Term>
  static void add_terms(const T* z, int64_t n, const T* ahead, const Term& term, double& sum,
                        double& dot) {
    Vec<A> sums[2] = {}, dots[2] = {};
    for (int64_t i = 0; i < n; i += kStep<T>) {
      prefetch_after<kStep<T> * sizeof(T)>(ahead + i);
      for (int k = 0; k < 4; k += 2) {
        Vec<A> a, b;
        load_two(z + i + k * kLanes<A>, a, b);
        term(a, sums[0], dots[0]);
        term(b, sums[1], dots[1]);
      }
    }
    sum += sum_lanes<A>(sums[0] + sums[1]);
    if (kEntropy) dot += sum_lanes<A>(dots[0] + dots[1]);
  }

  // Every z_j - M grows by M - M', which is negative.
  void raise_max(A to) {
    if (!(to > max)) return;
    if (max != -kInfinity<A>) {
      const double delta = double(max) - double(to);
      const double factor = std::exp2(delta * c);
      dot = factor == 0 ? 0 : factor * (dot + delta * sum);
      sum *= factor;
    }
    max = to;
    r = std::nearbyint(double(c) * double(max));
    correction = std::exp2(r - double(c) * double(max));
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
    OnlineSums<T, kEntropy> others(args.temperature);
    others.add_others(z, args.logits.vocab, y);

    const double shift = others.max == -kInfinity<A> ? 0 : double(others.max);
    const double log_sum = std::log(others.sum);
    const double log_odds = (double(widen(z[y])) - shift) / args.temperature - log_sum;
    const double log_p = -softplus(-log_odds), log_rest = -softplus(log_odds);
    logprobs[i] = A(log_p);
    maxima[i] = A(shift);
    // Where y is the only possible class, any finite number does: the others' e^{d} is 0.
    log_norms[i] = others.sum == 0 ? A(0) : A(log_sum - log_rest);
    if (kEntropy) {
      const double rest = others.sum == 0 ? 0 : log_sum - others.dot / others.sum / args.temperature;
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
    const Vec<A> shift = splat(maxima[i]), scale = splat(A(-kLog2E / args.temperature));
    const double norm = log_norms[i] * kLog2E, r = std::nearbyint(norm < 1000 ? norm : 1000);
    const Vec<A> round = splat(A(kExp2Round<A> - r));
    const Vec<A> farthest = splat(A((kExp2Bias<A> - r) * args.temperature / kLog2E));
    const double k = std::exp2(r - norm) / args.temperature;
    const A a = A(-(g + double(g_entropy) * (double(entropy) - log_norms[i])) * k);
    const A b = A(double(g_entropy) * k / args.temperature);
    const auto gradient = [&](Vec<A> x) {
      const Vec<A> below = smaller(farthest, shift - x);
      return exp2_product<A>(below, scale, round) * (a + b * below);
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
