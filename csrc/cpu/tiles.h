// Tokens a tile at a time, contiguous and kLanes wide, whatever the strides of their tensors: so that
// the loop over a tile has one form. Anonymous namespace: see ops.h.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "simd.h"
#include "tokens.h"

namespace ppo::PPO_ISA {
namespace {

// Of a comparison: all bits set in the lanes where it holds.
template <class A> using Truth = decltype(Vec<A>{} < Vec<A>{});

template <class A>
inline Vec<A> where(Truth<A> condition, Vec<A> x) {
  return condition ? x : Vec<A>{};
}

template <class A>
inline Vec<A> clamp(Vec<A> x, Vec<A> low, Vec<A> high) {  // NaN stays
  x = x < low ? low : x;
  return x > high ? high : x;
}

template <class A>
inline Vec<A> magnitude(Vec<A> x) {
  return bit_cast<Vec<A>>(bit_cast<Bits<A>>(x) & ~bit_cast<Bits<A>>(splat(A(-0.0))));
}

// So many tokens are summed in A before their sum is added in float64: few enough that the rounding
// of fp32 is nothing. A whole number of vectors.
constexpr int64_t kTile = 256;
template <class A> constexpr int64_t kWidth = kLanes<A>;

// Tokens t to t + n of a row (n <= kTile) one after the other in memory, with zeros up to a whole
// number of vectors: where they lie, or else copied to `room`. Null where there is no such tensor.
template <class A, class T>
const T* tile(const Row<const T>& row, int64_t t, int64_t n, T* room) {
  if (!row) return nullptr;
  if (row.stride == 1 && n % kWidth<A> == 0) return row.data + t;
  for (int64_t i = 0; i < n; ++i) room[i] = row[t + i];
  for (int64_t i = n; i % kWidth<A>; ++i) room[i] = T{};
  return room;
}

// The same of a mask; without one, every token is real.
template <class A>
const uint8_t* mask_tile(const Row<const uint8_t>& mask, int64_t t, int64_t n, uint8_t* room) {
  if (mask) return tile<A>(mask, t, n, room);
  std::memset(room, 1, size_t(n));
  for (int64_t i = n; i % kWidth<A>; ++i) room[i] = 0;
  return room;
}

// Where the results of such a tile are written: where they belong, or to `room`, from where
// `deliver` takes them.
template <class A>
A* out_tile(const Row<A>& row, int64_t t, int64_t n, A* room) {
  if (!row) return nullptr;
  return row.stride == 1 && n % kWidth<A> == 0 ? row.data + t : room;
}
template <class A>
void deliver(const Row<A>& row, int64_t t, int64_t n, const A* room, const A* from) {
  for (int64_t i = 0; from == room && i < n; ++i) row[t + i] = room[i];
}

// The kLanes bytes of a mask as a condition. Of these, the compiler would take one after another.
template <class A>
inline Truth<A> real_lanes(const uint8_t* mask) {
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4) {
    const __mmask16 all = 0xffff;  // without a mask, GCC 12 warns of its own header
    return Truth<A>(_mm512_maskz_cvtepu8_epi32(all, load_bits<__m128i>(mask))) > 0;
  } else {
    const __mmask8 all = 0xff;
    return Truth<A>(_mm512_maskz_cvtepu8_epi64(all, _mm_loadl_epi64((const __m128i*)mask))) > 0;
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(A) == 4) {
    return Truth<A>(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)mask))) > 0;
  } else {
    return Truth<A>(_mm256_cvtepu8_epi64(_mm_cvtsi32_si128(load_bits<int32_t>(mask)))) > 0;
  }
#else
  using Bytes = typename VectorTypes<A>::Bytes;
  return __builtin_convertvector(load_bits<Bytes>(mask), Truth<A>) != 0;
#endif
}

// A total in float64, lane by lane, to which each tile's sum in A is added; or its count of truths,
// each of which is -1.
template <class A>
class Total {
 public:
  void add(Vec<A> of_tile) { lanes_ += __builtin_convertvector(of_tile, Doubles); }
  void add_count(Truth<A> of_tile) { lanes_ -= __builtin_convertvector(of_tile, Doubles); }
  double sum() const {
    double sum = 0;
    for (int i = 0; i < kLanes<A>; ++i) sum += lanes_[i];
    return sum;
  }

 private:
  using Doubles = typename VectorTypes<A>::Doubles;
  Doubles lanes_{};
};

}  // namespace
}  // namespace ppo::PPO_ISA
