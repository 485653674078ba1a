// Tokens of any dtype as vectors of double, for recursions and sums that need the precision.
// Anonymous namespace: see ops.h.
#pragma once

#include "simd.h"
#include "tokens.h"

namespace ppo::PPO_ISA {
namespace {

using Doubles = Vec<double>;
constexpr int kDoubles = kLanes<double>;

typedef float Floats __attribute__((vector_size(kDoubles * 4)));
typedef uint32_t FloatBits __attribute__((vector_size(kDoubles * 4)));
typedef uint16_t HalfBits __attribute__((vector_size(kDoubles * 2)));

using Lanes = UpTo<kDoubles>::Type;

// Lane by lane, which compilers know as one instruction; older ones split __builtin_convertvector.
template <int... i>
inline Doubles widened(Floats x, Indices<i...>) {
  return Doubles{double(x[i])...};
}
inline FloatBits load_wide_bits(const void* p) {
  return __builtin_convertvector(load_bits<HalfBits>(p), FloatBits);
}

inline Doubles load_doubles(const double* p) { return load(p); }
inline Doubles load_doubles(const float* p) { return widened(load_bits<Floats>(p), Lanes{}); }
inline Doubles load_doubles(const bf16* p) {
  return widened(widen_bf16<Floats>(load_wide_bits(p)), Lanes{});
}
inline Doubles load_doubles(const f16* p) {
  return widened(widen_f16<Floats>(load_wide_bits(p)), Lanes{});
}

inline void store_doubles(double* p, Doubles x) { store(p, x); }
inline void store_doubles(float* p, Doubles x) {
  const Floats floats = __builtin_convertvector(x, Floats);
  std::memcpy(p, &floats, sizeof(floats));
}

// Lane i becomes lane i + n; zeros come in at the end.
template <int n, int... i>
inline Doubles shifted(Doubles x, Indices<i...>) {
#if defined(__clang__)
  return __builtin_shufflevector(x, Doubles{}, (i + n)...);
#else
  return __builtin_shuffle(x, Doubles{}, Bits<double>{(i + n)...});
#endif
}
template <int n>
inline Doubles shifted(Doubles x) {
  return shifted<n>(x, Lanes{});
}

// Lane 0 in every lane.
inline Doubles first_everywhere(Doubles x) { return splat(x[0]); }

// One token or kDoubles tokens of a row, as X is double or Doubles.
template <class X, class T>
inline X read(const Row<const T>& row, int64_t t) {
  if constexpr (sizeof(X) == sizeof(double)) return double(widen(row[t]));
  else return load_doubles(row.data + t);
}
template <class A>
inline void write(const Row<A>& row, int64_t t, double x) { row[t] = A(x); }
template <class A>
inline void write(const Row<A>& row, int64_t t, Doubles x) { store_doubles(row.data + t, x); }

inline double first_of(double x) { return x; }
inline double first_of(Doubles x) { return x[0]; }

// A sum of single numbers and of vectors, always in the same order.
struct Sum {
  Doubles lanes{};

  void add(double x) { lanes[0] += x; }
  void add(Doubles x) { lanes += x; }
  double total() const { return sum_lanes<double>(lanes); }
};

// MomentSums of single numbers and of vectors.
struct MomentLanes {
  double origin = 0;
  int64_t count = 0;
  Sum sum, sum_sq;

  template <class X>
  void add(X x) {
    if (__builtin_expect(count == 0, false)) origin = first_of(x);
    const X d = x - origin;
    count += sizeof(X) / sizeof(double);
    sum.add(d);
    sum_sq.add(X(d * d));
  }
  MomentSums total() const { return {origin, double(count), sum.total(), sum_sq.total()}; }
};

}  // namespace
}  // namespace ppo::PPO_ISA
