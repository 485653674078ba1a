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

// 2^(c x - R) for an integer R, where -bias <= c x - R <= bias, to 3 ulp; below the normal numbers it
// may be 0, NaN stays. c x = N + f; adding kExp2Round - R leaves N - R, biased, in the lowest bits.
// With fused multiply-add, f has all its digits however large c x is; else it lacks |c x| / 2 ulp.
template <class A> constexpr A kExp2Bias = A(ExpConstants<A>::kBias);
template <class A> constexpr A kExp2Round = ExpConstants<A>::kRound + kExp2Bias<A>;

template <class A>
inline Vec<A> exp2_product(Vec<A> x, Vec<A> c, Vec<A> round_minus_r) {
  using C = ExpConstants<A>;
  const Vec<A> shifted = multiply_add(x, c, round_minus_r);
  const Vec<A> f = multiply_add(x, c, round_minus_r - shifted);
  const Vec<A> scale = bit_cast<Vec<A>>(bit_cast<Bits<A>>(shifted) << C::kMantissa);
  return (polynomial(f, C::kPolynomial2) * f + A(1)) * scale;
}

}  // namespace
}  // namespace ppo::PPO_ISA
