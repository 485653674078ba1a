// Vectors of the width of the instruction set, through the compiler's vector extensions: the same
// source is AVX-512, AVX2, SSE2 or NEON. Anonymous namespace: see ops.h.
#pragma once

#include "dtypes.h"

namespace ppo::PPO_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

// A accumulates (float or double); Lanes numbers at a time. Bits are unsigned, of A's size.
template <class A> struct VectorTypes;
template <> struct VectorTypes<float> {
  static constexpr int kLanes = kVectorBytes / 4;
  typedef float Vec __attribute__((vector_size(kVectorBytes)));
  typedef uint32_t Bits __attribute__((vector_size(kVectorBytes)));
  typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));
  typedef uint8_t Bytes __attribute__((vector_size(kVectorBytes / 4)));
  typedef double Doubles __attribute__((vector_size(kVectorBytes * 2)));
};
template <> struct VectorTypes<double> {
  static constexpr int kLanes = kVectorBytes / 8;
  typedef double Vec __attribute__((vector_size(kVectorBytes)));
  typedef uint64_t Bits __attribute__((vector_size(kVectorBytes)));
  typedef uint8_t Bytes __attribute__((vector_size(kVectorBytes / 8)));
  typedef double Doubles __attribute__((vector_size(kVectorBytes)));
};
template <class A> using Vec = typename VectorTypes<A>::Vec;
template <class A> using Bits = typename VectorTypes<A>::Bits;
template <class A> constexpr int kLanes = VectorTypes<A>::kLanes;

template <class A>
inline Vec<A> splat(A x) {
  return x - Vec<A>{};  // not Vec<A>{} + x, which turns -0 into 0
}

template <class To>
inline To load_bits(const void* p) {
  To bits;
  std::memcpy(&bits, p, sizeof(To));
  return bits;
}

inline Bits<float> load_halves(const void* p) {
  using Types = VectorTypes<float>;
  return __builtin_convertvector(load_bits<Types::Halves>(p), Types::Bits);
}
inline void store_halves(void* p, Bits<float> bits) {
  const auto halves = __builtin_convertvector(bits, VectorTypes<float>::Halves);
  std::memcpy(p, &halves, sizeof(halves));
}

// kLanes numbers from memory, unaligned, widened to the accumulation dtype; and back.
inline Vec<float> load(const float* p) { return load_bits<Vec<float>>(p); }
inline Vec<double> load(const double* p) { return load_bits<Vec<double>>(p); }
inline Vec<float> load(const bf16* p) { return widen_bf16<Vec<float>>(load_halves(p)); }
inline Vec<float> load(const f16* p) { return widen_f16<Vec<float>>(load_halves(p)); }

inline void store(float* p, Vec<float> x) { std::memcpy(p, &x, sizeof(x)); }
inline void store(double* p, Vec<double> x) { std::memcpy(p, &x, sizeof(x)); }
inline void store(bf16* p, Vec<float> x) { store_halves(p, narrow_bf16<Bits<float>>(x)); }
inline void store(f16* p, Vec<float> x) { store_halves(p, narrow_f16<Bits<float>>(x)); }

// The first n < kLanes numbers, the other lanes `fill`.
template <class T, class A = Accumulator<T>>
inline Vec<A> load_first(const T* p, int64_t n, A fill) {
  Vec<A> x = splat(fill);
  for (int64_t i = 0; i < n; ++i) x[i] = widen(p[i]);
  return x;
}
template <class T, class V>
inline void store_first(T* p, int64_t n, V x) {
  for (int64_t i = 0; i < n; ++i) narrow(x[i], p[i]);
}

// NaN in x is ignored: the comparison is false.
template <class V>
inline V larger(V x, V than) {
  return x > than ? x : than;
}

// In a fixed order, so that a sum is the same from run to run.
template <class A>
inline double sum_lanes(Vec<A> x) {
  double sum = 0;
  for (int i = 0; i < kLanes<A>; ++i) sum += x[i];
  return sum;
}
template <class A>
inline A max_lanes(Vec<A> x) {
  A max = x[0];
  for (int i = 1; i < kLanes<A>; ++i) max = x[i] > max ? x[i] : max;
  return max;
}

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
};

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
    constexpr int degree = sizeof(C::kPolynomial) / sizeof(A) - 1;
    Vec<A> p = splat(C::kPolynomial[degree]);
    for (int i = degree - 1; i >= 0; --i) p = p * r + C::kPolynomial[i];
    tail = (p * r) * r + r;
    scale = bit_cast<Vec<A>>((bit_cast<Bits<A>>(shifted) + C::kBias) << C::kMantissa);
  }
};

// e^x for |x| <= kExpMax (or NaN, which stays), to 1 ulp; results below the normal numbers are 0.
template <class A>
inline Vec<A> exp_bounded(Vec<A> x) {
  const ExpParts<A> e(x);
  return (e.tail + A(1)) * e.scale;
}

// e^x - 1 for the same x, without cancellation near 0.
template <class A>
inline Vec<A> expm1_bounded(Vec<A> x) {
  const ExpParts<A> e(x);
  return e.tail * e.scale + (e.scale - A(1));
}

// max(x, -kExpMax), where exp_bounded is 0; NaN stays.
template <class A>
inline Vec<A> clamp_low(Vec<A> x) {
  const Vec<A> low = splat(-kExpMax<A>);
  return x < low ? low : x;
}

}  // namespace
}  // namespace ppo::PPO_ISA
