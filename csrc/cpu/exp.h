// Vector exponentials. Anonymous namespace: see ops.h.
#pragma once

#include "simd.h"

namespace ppo::PPO_ISA {
namespace {

template <class A> struct ExpConstants;
template <> struct ExpConstants<float> {
  static constexpr float kMax = 88.0f;
  static constexpr float kRound = 0x1.8p23f;
  static constexpr float kLn2High = 0x1.63p-1f, kLn2Low = -0x1.bd0106p-13f;
  static constexpr uint32_t kBias = 127;
  static constexpr int kMantissa = 23;
  // Minimax (Remez) for (e^r - 1 - r) / r^2 on |r| <= ln(2) / 2: e^r to 2^-28.
  static constexpr float kPolynomial[] = {0.49999993412501566f, 0.16666520107819590f,
                                          0.041668394210893870f, 0.0083687804111805336f,
                                          0.0013814467059326511f};
  // For (2^f - 1) / f on |f| <= 1/2: 2^f to 2^-23.3, a term less than above.
  static constexpr float kPolynomial2[] = {0.693147004f, 0.240222439f, 0.0555071831f,
                                           0.00967145711f, 0.00132647506f};
  // For (2^(f/8) - 1) / f on |f| <= 1/2: 2^(f/8) to 2^-25.
  static constexpr float kPolynomial8[] = {0.0866434053f, 0.00375402556f, 0.000108391060f};
};
template <> struct ExpConstants<double> {
  static constexpr double kMax = 709.0;
  static constexpr double kRound = 0x1.8p52;
  static constexpr double kLn2High = 0x1.62e42feep-1, kLn2Low = 0x1.a39ef35793c76p-33;
  static constexpr uint64_t kBias = 1023;
  static constexpr int kMantissa = 52;
  // The same, to 2^-64.
  static constexpr double kPolynomial[] = {
      0.50000000000000000444, 0.16666666666666683571, 0.041666666666666089114,
      0.0083333333333169170922, 0.0013888888889117263737, 0.00019841269896680873309,
      0.000024801586924605618366, 2.7557234558864359991e-6, 2.7557582794922773754e-7,
      2.5112144464446658861e-8, 2.0826536486776393989e-9};
  // To 2^-58.
  static constexpr double kPolynomial2[] = {
      0.6931471805599453259, 0.24022650695910131559, 0.055504108664820075737,
      0.0096181291075939831381, 0.0013333558146776005689, 0.00015403530457302675,
      0.000015252733492194877397, 1.3215435179594684e-6, 1.0178199798760150648e-7,
      7.0738020714611657e-9, 4.4347605649401571e-10};
};

// c[0] + c[1] x + c[2] x^2 + ...
template <class V, class A, size_t n>
inline V polynomial(V x, const A (&c)[n]) {
  V p = c[n - 1] - V{};
  for (size_t i = n - 1; i-- > 0;) p = p * x + c[i];
  return p;
}

// The largest x of exp_bounded; at its negative, the result is exactly 0.
template <class A> constexpr A kExpMax = ExpConstants<A>::kMax;

// x = n ln 2 + r, e^x = 2^n e^r. Adding kRound leaves n in the lowest bits of the sum.
template <class A>
struct ExpParts {
  Vec<A> tail;   // e^r - 1
  Vec<A> scale;  // 2^n

  explicit ExpParts(Vec<A> x) {
    using C = ExpConstants<A>;
    const Vec<A> shifted = x * A(1.4426950408889634) + C::kRound;
    const Vec<A> n = shifted - C::kRound;
    const Vec<A> r = (x - n * C::kLn2High) - n * C::kLn2Low;
    tail = (polynomial(r, C::kPolynomial) * r) * r + r;
    scale = bit_cast<Vec<A>>((bit_cast<Bits<A>>(shifted) + C::kBias) << C::kMantissa);
  }
};

// e^x for |x| <= kExpMax (or NaN, which stays), to 1.1 ulp; below the normal numbers it may be 0.
template <class A>
inline Vec<A> exp_bounded(Vec<A> x) {
  const ExpParts<A> e(x);
  return (e.tail + A(1)) * e.scale;
}

// e^x - 1 for the same x, to 2 ulp: nothing cancels near 0.
template <class A>
inline Vec<A> expm1_bounded(Vec<A> x) {
  const ExpParts<A> e(x);
  return e.tail * e.scale + (e.scale - A(1));
}

// c tanh(x / c), by e^{-2 |x| / c} - 1: that loses no digits near 0. Without kCapped, x.
template <bool kCapped, class A>
inline Vec<A> capped(Vec<A> x, A cap) {
  if constexpr (!kCapped) return x;
  const Bits<A> sign = bit_cast<Bits<A>>(splat(A(-0.0)));
  const Vec<A> size = bit_cast<Vec<A>>(bit_cast<Bits<A>>(x) & ~sign);
  const Vec<A> exponent = size * (-2 / cap), least = splat(-kExpMax<A>);
  const Vec<A> e = expm1_bounded<A>(exponent < least ? least : exponent);
  const Vec<A> y = e / (e + 2) * -cap;
  return bit_cast<Vec<A>>(bit_cast<Bits<A>>(y) | (bit_cast<Bits<A>>(x) & sign));
}

// 2^(c x - r) for c > 0 and an integer r, to 3 ulp, where -bias <= c x - r <= bias. Where the exact
// result is below the normal numbers, so is this, but without digits. NaN stays. With fused
// multiply-add nothing is lost however large c x is; without, its rounding adds |c x| / 2 ulp.
//
// kSteps (c x - r) = n + f, n an integer. Adding kRound leaves n, biased, in the lowest bits of the sum.
// Where an instruction picks each lane's number from a table of 8, kSteps is 8: the fraction of
// n / 8 comes from there, and the polynomial needs fewer terms.
template <class A>
class Exp2 {
  using C = ExpConstants<A>;
#if defined(__AVX2__)
  static constexpr int kSteps = sizeof(A) == sizeof(float) ? 8 : 1;
#else
  static constexpr int kSteps = 1;
#endif

 public:
  Exp2(A c, A r)
      : c_(splat(c * kSteps)), round_(splat(C::kRound + (A(C::kBias) - r) * kSteps)),
        lowest_(splat((r - A(C::kBias)) / c)) {}

  // The x of the least power, which is 0.
  Vec<A> at_least() const { return lowest_; }

  Vec<A> operator()(Vec<A> x) const {
    Bits<A> unused{};
    return (*this)(x, unused);
  }

  // The same for any x: `exponents` gathers what in_range wants to know.
  Vec<A> operator()(Vec<A> x, Bits<A>& exponents) const {
    const Vec<A> shifted = multiply_add(x, c_, round_);
    const Vec<A> f = multiply_add(x, c_, round_ - shifted);
    const Bits<A> n = bit_cast<Bits<A>>(shifted) - bit_cast<Bits<A>>(splat(C::kRound));
    exponents |= n;
    if constexpr (kSteps == 8) {
      const Vec<A> scale = bit_cast<Vec<A>>((n << (C::kMantissa - 3)) + eighths(n));
      return (polynomial(f, C::kPolynomial8) * f + A(1)) * scale;
    } else {
      const Vec<A> scale = bit_cast<Vec<A>>(n << C::kMantissa);
      return (polynomial(f, C::kPolynomial2) * f + A(1)) * scale;
    }
  }

  // Whether -bias <= c x - r < 1 for all those x, rounded to a step; not if one is NaN. The bound is
  // a power of two: all n are below it if their bits together are.
  static bool in_range(Bits<A> exponents) {
    auto any = exponents[0];
    for (int i = 1; i < kLanes<A>; ++i) any |= exponents[i];
    return any < (C::kBias + 1) * kSteps;
  }

 private:
#if defined(__AVX2__)
  // What the bits of 2^(n/8) have beyond those of n << 20, by the lowest 3 bits of n.
  static Bits<float> eighths(Bits<float> n) {
    alignas(32) static constexpr int32_t kTable[8] = {
        0x3f800000 - 0x3f800000, 0x3f8b95c2 - 0x3f900000, 0x3f9837f0 - 0x3fa00000,
        0x3fa5fed7 - 0x3fb00000, 0x3fb504f3 - 0x3fc00000, 0x3fc5672a - 0x3fd00000,
        0x3fd744fd - 0x3fe00000, 0x3feac0c7 - 0x3ff00000};
#if defined(__AVX512F__)
    const __mmask16 all = 0xffff;  // without a mask, GCC 12 warns of its own header
    const __m512i table = _mm512_maskz_broadcast_i32x8(all, load_bits<__m256i>(kTable));
    return Bits<float>(_mm512_maskz_permutexvar_epi32(all, __m512i(n), table));
#else
    return Bits<float>(_mm256_permutevar8x32_epi32(load_bits<__m256i>(kTable), __m256i(n)));
#endif
  }
#else
  static Bits<A> eighths(Bits<A> n);  // not called: kSteps is 1
#endif

  const Vec<A> c_, round_, lowest_;
};

}  // namespace
}  // namespace ppo::PPO_ISA
