// Vectors of the width of the instruction set, through the compiler's vector extensions: the same
// source is AVX-512, AVX2, SSE2 or NEON. Anonymous namespace: see ops.h.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

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

// A accumulates (float or double), kLanes numbers at a time. Bits are unsigned, of A's size.
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
typedef int16_t Shorts __attribute__((vector_size(kVectorBytes)));
template <class A> using Vec = typename VectorTypes<A>::Vec;
template <class A> using Bits = typename VectorTypes<A>::Bits;
template <class A> constexpr int kLanes = VectorTypes<A>::kLanes;

// 0 to n - 1 as template arguments.
template <int... i> struct Indices {};
template <int n, int... i> struct UpTo : UpTo<n - 1, n - 1, i...> {};
template <int... i> struct UpTo<0, i...> { using Type = Indices<i...>; };

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

// A vector just loaded, in a register before anything selects from its lanes. Of a load and a
// selection compilers make one masked load, for which Zen 5 does not prefetch: memory is then read
// at half the speed.
template <class V>
inline V whole(V x) {
#if defined(__AVX512F__)
  asm("" : "+v"(x));
#endif
  return x;
}

// kLanes numbers from memory, unaligned, widened to the accumulation dtype; and back.
inline Vec<float> load(const float* p) { return whole(load_bits<Vec<float>>(p)); }
inline Vec<double> load(const double* p) { return whole(load_bits<Vec<double>>(p)); }
inline Vec<float> load(const bf16* p) { return widen_bf16<Vec<float>>(load_halves(p)); }
#if defined(__AVX512F__)
inline Vec<float> load(const f16* p) {
  const __mmask16 all = 0xffff;  // without a mask, GCC 12 warns of its own header
  return whole<Vec<float>>(_mm512_maskz_cvtph_ps(all, load_bits<__m256i>(p)));
}
#elif defined(__AVX2__) && defined(__F16C__)
inline Vec<float> load(const f16* p) { return _mm256_cvtph_ps(load_bits<__m128i>(p)); }
#else
inline Vec<float> load(const f16* p) { return widen_f16<Vec<float>>(load_halves(p)); }
#endif

inline void store(float* p, Vec<float> x) { std::memcpy(p, &x, sizeof(x)); }
inline void store(double* p, Vec<double> x) { std::memcpy(p, &x, sizeof(x)); }
inline void store(bf16* p, Vec<float> x) { store_halves(p, narrow_bf16<Bits<float>>(x)); }
inline void store(f16* p, Vec<float> x) { store_halves(p, narrow_f16<Bits<float>>(x)); }

// 2 kLanes numbers, in an order that only depends on T. The two halves of a word take one instruction
// each to widen; in the order of memory they would take a shuffle more.
template <class T, class A = Accumulator<T>>
inline void load_two(const T* p, Vec<A>& a, Vec<A>& b) {
  a = load(p);
  b = load(p + kLanes<A>);
}
inline void load_two(const bf16* p, Vec<float>& a, Vec<float>& b) {
  const auto words = load_bits<Bits<float>>(p);
  a = bit_cast<Vec<float>>(words << 16);
  b = bit_cast<Vec<float>>(words & 0xffff0000u);
}

// That order: in memory, the numbers of a are kStepOfTwo apart, and kSecondOfTwo before those of b.
template <class T> constexpr int kStepOfTwo = 1;
template <> constexpr int kStepOfTwo<bf16> = 2;
template <class T> constexpr int kSecondOfTwo = kLanes<Accumulator<T>>;
template <> constexpr int kSecondOfTwo<bf16> = 1;

template <class T, class V>
inline void store_two(T* p, V a, V b) {
  store(p, a);
  store(p + sizeof(V) / sizeof(a[0]), b);
}
inline void store_two(bf16* p, Vec<float> a, Vec<float> b) {
  const Bits<float> words = narrow_bf16<Bits<float>>(a) | narrow_bf16<Bits<float>>(b) << 16;
  std::memcpy(p, &words, sizeof(words));
}

// The first n < kLanes numbers, the other lanes 0.
template <class T, class A = Accumulator<T>>
inline Vec<A> load_first(const T* p, int64_t n) {
  Vec<A> x{};
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

// a b + c, where kFused rounded once. (Elsewhere a compiler may fuse them or not.)
#if defined(__AVX512F__)
constexpr bool kFused = true;
inline Vec<float> multiply_add(Vec<float> a, Vec<float> b, Vec<float> c) {
  return _mm512_fmadd_ps(a, b, c);
}
inline Vec<double> multiply_add(Vec<double> a, Vec<double> b, Vec<double> c) {
  return _mm512_fmadd_pd(a, b, c);
}
#elif defined(__AVX2__) && defined(__FMA__)
constexpr bool kFused = true;
inline Vec<float> multiply_add(Vec<float> a, Vec<float> b, Vec<float> c) {
  return _mm256_fmadd_ps(a, b, c);
}
inline Vec<double> multiply_add(Vec<double> a, Vec<double> b, Vec<double> c) {
  return _mm256_fmadd_pd(a, b, c);
}
#else
constexpr bool kFused = false;
template <class V>
inline V multiply_add(V a, V b, V c) {
  return a * b + c;
}
#endif

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

}  // namespace
}  // namespace ppo::PPO_ISA
