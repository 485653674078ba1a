// Numbers of a row picked out: those from a bound on, and the bound from which on lies so much of
// their count or weight. Anonymous namespace: see ops.h.
#pragma once

#include "online_sums.h"
#include "tiles.h"

namespace ppo::PPO_ISA {
namespace {

#if defined(__AVX2__) && !defined(__AVX512F__)
// For each set of 8 lanes, these first: their numbers, a byte each.
struct Orders {
  uint64_t of[256] = {};

  constexpr Orders() {
    for (int set = 0; set < 256; ++set) {
      int place = 0;
      for (uint64_t lane = 0; lane < 8; ++lane) {
        if (set >> lane & 1) of[set] |= lane << (8 * place++);
      }
    }
  }
};
#endif

// Writes the lanes of x that are kept side by side, at most kLanes of them; what follows up to
// to + kLanes is overwritten. Returns how many.
template <class A>
inline int64_t append(A* to, Vec<A> x, Truth<A> keep) {
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4) {
    const __mmask16 set = _mm512_movepi32_mask(__m512i(keep));
    store(to, Vec<A>(_mm512_maskz_compress_ps(set, __m512(x))));
    return __builtin_popcount(set);
  } else {
    const __mmask8 set = _mm512_movepi64_mask(__m512i(keep));
    store(to, Vec<A>(_mm512_maskz_compress_pd(set, __m512d(x))));
    return __builtin_popcount(set);
  }
#else
#if defined(__AVX2__)
  if constexpr (sizeof(A) == 4) {
    static constexpr Orders orders;
    const int set = _mm256_movemask_ps(__m256(keep));
    const __m128i order = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(orders.of + set));
    store(to, Vec<A>(_mm256_permutevar8x32_ps(__m256(x), _mm256_cvtepu8_epi32(order))));
    return __builtin_popcount(unsigned(set));
  }
#endif
  int64_t count = 0;
  for (int i = 0; i < kLanes<A>; ++i) {
    to[count] = x[i];
    count += keep[i] != 0;
  }
  return count;
#endif
}

// Those of the n numbers z that are `lowest` or more, in their order, and kLanes of room after them.
template <class T, class A = Accumulator<T>>
int64_t gather(const T* z, int64_t n, A lowest, A* to) {
  const Vec<A> least = splat(lowest);
  int64_t count = 0, i = 0;
  for (; i + kLanes<A> <= n; i += kLanes<A>) {
    const Vec<A> x = load(z + i);
    count += append<A>(to + count, x, x >= least);
  }
  for (; i < n; ++i) {
    to[count] = widen(z[i]);
    count += to[count] >= lowest;
  }
  return count;
}

// Weights e^{(z - M) / T} of a row: 0 where that is below the normal numbers.
template <class A>
class Weights {
 public:
  Weights(double temperature, A shift) : power_(A(kLog2E / temperature), 0), shift_(splat(shift)) {}

  Vec<A> operator()(Vec<A> z) const { return power_(larger(power_.at_least(), z - shift_)); }

 private:
  const Exp2<A> power_;
  const Vec<A> shift_;
};

// Each counts as one, but NaN as none.
template <class A>
struct Ones {
  Vec<A> operator()(Vec<A> z) const { return where<A>(z == z, splat(A(1))); }
};

// Integers in the order of the numbers, and back.
inline int64_t ordered(double x) {
  const int64_t bits = bit_cast<int64_t>(x);
  return bits < 0 ? bits ^ INT64_MAX : bits;
}
inline int64_t ordered(float x) {
  const int32_t bits = bit_cast<int32_t>(x);
  return bits < 0 ? bits ^ INT32_MAX : bits;
}
template <class A>
inline A from_ordered(int64_t i) {
  if constexpr (sizeof(A) == 8) return bit_cast<A>(i < 0 ? i ^ INT64_MAX : i);
  else return bit_cast<A>(int32_t(i < 0 ? i ^ INT32_MAX : i));
}

// The largest number of a list that together with all above it weighs `least`; the smallest where
// all do not. By bisection; each step leaves in the list only what is between the bounds. The list
// is changed, and has kLanes of room after its end.
template <class A, class Weigh>
A lowest_of(A* list, int64_t n, double least, const Weigh& weigh) {
  const A none = A(__builtin_nan(""));
  const auto each = [&](const auto& body) {
    store(list + n, splat(none));  // in no comparison true
    for (int64_t i = 0; i < n; i += kLanes<A>) body(load(list + i));
  };
  const auto lanes_least = [](Vec<A> x) { return -max_lanes<A>(-x); };

  Vec<A> minima = splat(kInfinity<A>), maxima = splat(-kInfinity<A>);
  each([&](Vec<A> x) {
    minima = x < minima ? x : minima;
    maxima = larger(x, maxima);
  });
  int64_t low = ordered(lanes_least(minima)), high = ordered(max_lanes<A>(maxima));
  double above = 0;  // of those that are no longer in the list
  while (low < high) {
    // Above `low`, at most `high`; their sum might overflow.
    const int64_t middle = (low >> 1) + (high >> 1) + (low & high & 1) + 1;
    const Vec<A> bound = splat(from_ordered<A>(middle));
    Total<A> total;
    minima = splat(kInfinity<A>), maxima = splat(-kInfinity<A>);
    each([&](Vec<A> x) {
      const Truth<A> upper = x >= bound;
      total.add(where<A>(upper, weigh(x)));
      const Vec<A> from_upper = upper ? x : splat(kInfinity<A>);
      minima = from_upper < minima ? from_upper : minima;
      maxima = larger(upper ? splat(-kInfinity<A>) : x, maxima);
    });
    const bool enough = above + total.sum() >= least;
    // The bounds become numbers of the list; but they move even where denormal numbers equal 0.
    if (enough) {
      const int64_t least_left = ordered(lanes_least(minima));
      low = least_left > middle ? least_left : middle;
    } else {
      const int64_t most_left = ordered(max_lanes<A>(maxima));
      high = most_left < middle ? most_left : middle - 1;
      above += total.sum();
    }
    int64_t left = 0;
    each([&](Vec<A> x) {
      left += append<A>(list + left, x, enough ? Truth<A>(x >= bound) : Truth<A>(x < bound));
    });
    n = left;
  }
  return from_ordered<A>(low);
}

}  // namespace
}  // namespace ppo::PPO_ISA
