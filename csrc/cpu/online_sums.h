// Rows of logits: their largest, and sum e^{d_j} of their classes in one pass.
// Anonymous namespace: see ops.h.
#pragma once

#include <cmath>

#include "exp.h"
#include "rows.h"

namespace ppo::PPO_ISA {
namespace {

constexpr double kLog2E = 1.4426950408889634074;

template <class A>
constexpr A kInfinity = A(__builtin_huge_val());

// Rows are taken in blocks, whose sums in the accumulation dtype are then added in double.
constexpr int64_t kBlock = 1024;
// Prefetch distance: the processor's own prefetching stops at the end of a page.
constexpr int kPrefetchBytes = 2048;
// What block_max takes at once; divides kBlock.
template <class T> constexpr int64_t kStep = 4 * kLanes<Accumulator<T>>;

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

template <bool kCapped, class A>
inline A capped_one(A x, A cap) {
  return capped<kCapped>(splat(x), cap)[0];
}

// S and U of the classes seen so far, U without the 1 / T: sum e^{d_j} (z_j - M). For M, any number
// near the largest logit will do, and M only changes where it must.
//
// Exponents are in base 2: e^{d_j} = 2^{c (z_j - M)}, c = log2(e) / T. Where that loses nothing, the
// subtraction is left to the exponent: 2^{c z_j - R}, R the integer next to c M. A block whose
// exponents turn out not to lie in a range that is safe is done again, with care.
template <class T, bool kEntropy, bool kCapped, class A = Accumulator<T>>
class OnlineSums {
 public:
  A shift = -kInfinity<A>;  // M; -inf: none yet

  // Goes on from what `so_far` says of other classes.
  OnlineSums(double temperature, double softcap, const RowSums& so_far)
      : c(A(kLog2E / temperature)), cap(A(softcap)) {
    sums_[0] = so_far.sum;
    dots_[0] = so_far.dot;
    set_shift(A(so_far.shift));
  }

  double sum() const { return total(sums_); }

  RowSums result(double target) const {
    return {double(shift), sum(), total(dots_), target};
  }

  // Classes [begin, end) of a row, `begin` a whole number of steps.
  void add_all(const T* z, int64_t begin, int64_t end) {
    const int64_t whole = begin + (end - begin) / kStep<T> * kStep<T>;
    add(z, begin, whole);
    if (whole < end) add_few(z, whole, end, -1);
  }

  // All classes of a row but the target, which is as if it had no probability; it may be elsewhere.
  void add_others(const T* z, int64_t vocab, int64_t target) {
    const int64_t whole = vocab / kStep<T> * kStep<T>;
    const bool here = target >= 0 && target < vocab;
    const int64_t with_target = here ? target / kStep<T> * kStep<T> : whole;
    if (here) add_few(z, with_target, vocab, target);
    add(z, 0, with_target);
    add(z, with_target + kStep<T>, whole);
    if (whole < vocab && !(here && with_target == whole)) add_few(z, whole, vocab, target);
  }

 private:
  using Doubles = typename VectorTypes<A>::Doubles;

  static constexpr bool kByExponent = kFused && !kEntropy;
  static constexpr A kFar = 1 << 17;  // the largest c M of which it loses nothing
  // Exponents up to here are in range; a far M would cost digits.
  static constexpr int kHeadroom = 2;

  const A c, cap;
  Doubles sums_{}, dots_{};
  double r_ = 0, correction_ = 1;  // R, 2^{R - c M + kHeadroom}
  bool fits_ = true;  // false: a block was out of range and not for an M too small

  static double total(const Doubles& lanes) {
    double total = 0;
    for (int i = 0; i < kLanes<A>; ++i) total += lanes[i];
    return total;
  }

  // Classes [begin, end), whole steps.
  void add(const T* z, int64_t begin, int64_t end) {
    for (int64_t n; begin < end; begin += n) {
      n = end - begin < kBlock ? end - begin : kBlock;
      if (fits_ && shift != -kInfinity<A> && add_block(z + begin, n)) continue;
      const A before = shift;
      add_with_care<kCapped>(z + begin, n);
      fits_ = fits_ && shift > before;
    }
  }

  // The step, or less, that begins at `begin`, without the target.
  void add_few(const T* z, int64_t begin, int64_t vocab, int64_t target) {
    A step[kStep<T>];
    for (int64_t i = 0; i < kStep<T>; ++i) {
      const int64_t j = begin + i;
      const bool other = j < vocab && j != target;
      step[i] = other ? capped_one<kCapped, A>(widen(z[j]), cap) : -kInfinity<A>;
    }
    add_with_care<false>(step, kStep<T>);
  }

  // Whole steps. False, and nothing added, if an exponent is out of range or NaN, or M far.
  bool add_block(const T* z, int64_t n) {
    if (kByExponent && !(std::fabs(c * shift) < kFar)) return false;
    const Vec<A> m = splat(kByExponent ? A(0) : shift);
    const Exp2<A> power(c, A(kByExponent ? r_ + kHeadroom : kHeadroom));
    Bits<A> exponents{};
    Vec<A> sum, dot;
    add_terms<kCapped>(z, n, sum, dot, [&](Vec<A> x, Vec<A>& sum, Vec<A>& dot) {
      const Vec<A> d = kByExponent ? x : x - m, e = power(d, exponents);
      sum += e;
      if (kEntropy) dot += e * d;
    });
    if (!power.in_range(exponents)) return false;
    add_totals(sum, dot, kByExponent ? correction_ : 1 << kHeadroom);
    return true;
  }

  template <bool kCap, class U>
  __attribute__((noinline)) void add_with_care(const U* z, int64_t n) {
    raise_shift(capped_one<kCap, A>(block_max(z, n), cap));
    // Without any finite logit yet, 0 does for M: -inf gives 2^y = 0, NaN stays NaN.
    const Vec<A> m = splat(shift == -kInfinity<A> ? A(0) : shift);
    const Exp2<A> power(c, 0);
    Vec<A> sum, dot;
    add_terms<kCap>(z, n, sum, dot, [&](Vec<A> x, Vec<A>& sum, Vec<A>& dot) {
      const Vec<A> d = larger(power.at_least(), x - m), e = power(d);
      sum += e;
      if (kEntropy) dot += e * d;
    });
    add_totals(sum, dot, 1);
  }

  template <bool kCap, class U, class Term>
  void add_terms(const U* z, int64_t n, Vec<A>& sum, Vec<A>& dot, const Term& term) const {
    Vec<A> sums[2] = {}, dots[2] = {};
    for (int64_t i = 0; i < n; i += 2 * kLanes<A>) {
      for (int b = 0; b < 2 * kLanes<A> * int(sizeof(U)); b += 64) {
        __builtin_prefetch(reinterpret_cast<const char*>(z + i) + kPrefetchBytes + b);
      }
      Vec<A> a, b;
      load_two(z + i, a, b);
      term(capped<kCap>(a, cap), sums[0], dots[0]);
      term(capped<kCap>(b, cap), sums[1], dots[1]);
    }
    sum = sums[0] + sums[1];
    dot = dots[0] + dots[1];
  }

  void add_totals(Vec<A> sum, Vec<A> dot, double factor) {
    sums_ += __builtin_convertvector(sum, Doubles) * factor;
    if (kEntropy) dots_ += __builtin_convertvector(dot, Doubles) * factor;
  }

  // Every z_j - M grows by M - M', which is negative.
  void raise_shift(A to) {
    if (!(to > shift)) return;
    if (shift != -kInfinity<A>) {
      const double delta = double(shift) - double(to);
      const double factor = std::exp2(delta * c);
      dots_ = factor == 0 ? Doubles{} : factor * (dots_ + delta * sums_);
      sums_ *= factor;
    }
    set_shift(to);
  }

  void set_shift(A to) {
    shift = to;
    r_ = std::nearbyint(double(c) * double(shift));
    correction_ = std::exp2(std::fma(-double(c), double(shift), r_) + kHeadroom);
  }
};

}  // namespace
}  // namespace ppo::PPO_ISA
