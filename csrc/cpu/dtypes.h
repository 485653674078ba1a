// Storage dtypes, each with its accumulation dtype, and the way between them.
// Anonymous namespace: see ops.h.
#pragma once

#include <cstdint>
#include <cstring>

#include "ops.h"

namespace ppo::PPO_ISA {
namespace {

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

// As the standard library's, whose inline code instruction sets would share (ops.h).
template <class A, class B> constexpr bool kSame = false;
template <class A> constexpr bool kSame<A, A> = true;
template <bool first, class A, class B> struct Either { using type = A; };
template <class A, class B> struct Either<false, A, B> { using type = B; };
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <class T> struct AccumulatorOf { using type = float; };
template <> struct AccumulatorOf<double> { using type = double; };
template <class T> using Accumulator = typename AccumulatorOf<T>::type;

template <class To, class From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

// The conversions below take scalars or vectors alike: V is float and U uint32_t, or vectors of
// as many lanes each. `c ? a : b` works lane by lane on vectors.

template <class V, class U>
inline V widen_bf16(U bits) {
  return bit_cast<V>(bits << 16);
}

// Shifted into place, the exponent is 112 too small; the multiplication, exact, also makes the
// subnormals right. Inf and NaN need all exponent bits set.
template <class V, class U>
inline V widen_f16(U bits) {
  const U magnitude = (bits & 0x7fffu) << 13;
  const U finite = bit_cast<U>(V(bit_cast<V>(magnitude) * 0x1p112f));
  const U special = magnitude | 0x7f800000u;
  const U wide = magnitude >= 0x0f800000u ? special : finite;
  return bit_cast<V>(wide | ((bits & 0x8000u) << 16));
}

// To nearest, ties to even; NaN stays NaN. The result is in the low 16 bits of each lane.
template <class U, class V>
inline U narrow_bf16(V x) {
  const U bits = bit_cast<U>(x);
  const U rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const U nan = (bits >> 16) | 0x40u;
  return x == x ? rounded : nan;
}

template <class U, class V>
inline U narrow_f16(V x) {
  const U bits = bit_cast<U>(x);
  const U magnitude = bits & 0x7fffffffu;
  // Subnormal halves: adding 0.5 leaves the value, rounded, in the lowest mantissa bits.
  const U subnormal = bit_cast<U>(V(bit_cast<V>(magnitude) + 0.5f)) - 0x3f000000u;
  const U normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const U infinite = magnitude * 0u + 0x7c00u;
  const U nan = infinite | 0x200u;
  U half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? infinite : half;  // 65520 and above round to infinity
  half = magnitude > 0x7f800000u ? nan : half;
  return half | ((bits >> 16) & 0x8000u);
}

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(bf16 x) { return widen_bf16<float, uint32_t>(x.bits); }
inline float widen(f16 x) { return widen_f16<float, uint32_t>(x.bits); }

inline void narrow(float x, float& to) { to = x; }
inline void narrow(double x, double& to) { to = x; }
inline void narrow(float x, bf16& to) { to.bits = uint16_t(narrow_bf16<uint32_t>(x)); }
inline void narrow(float x, f16& to) { to.bits = uint16_t(narrow_f16<uint32_t>(x)); }

// Calls body(T{}) with the storage type that `dtype` names.
template <class Body>
inline void with_dtype(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::f32: return body(float{});
    case DType::f64: return body(double{});
    case DType::bf16: return body(bf16{});
    case DType::f16: return body(f16{});
  }
}

}  // namespace
}  // namespace ppo::PPO_ISA
