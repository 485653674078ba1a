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

template <class A>
void end_list(A* end) {
  store(end, splat(A(__builtin_nan(""))));  // in no comparison true
}

// Lists those of the n numbers z that are `lowest` or more, in their order, and kLanes of NaN after
// them. Of every `stride` vectors only the first is looked at. Returns how many.
template <class T, class A = Accumulator<T>>
int64_t gather(const T* z, int64_t n, A lowest, A* list, int64_t stride = 1) {
  const Vec<A> least = splat(lowest);
  int64_t count = 0, i = 0;
  for (; i + kLanes<A> <= n; i += kLanes<A> * stride) {
    const Vec<A> x = load(z + i);
    count += append<A>(list + count, x, x >= least);
  }
  for (; i < n; ++i) {
    list[count] = widen(z[i]);
    count += list[count] >= lowest;
  }
  end_list(list + count);
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

// Each counts as one.
template <class A>
struct Ones {
  Vec<A> operator()(Vec<A>) const { return splat(A(1)); }
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

// `weigh` of what is `lowest` or more; 0 of anything else.
template <class A, class Weigh>
auto from(A lowest, const Weigh& weigh) {
  return [&weigh, least = splat(lowest)](Vec<A> x) { return where<A>(x >= least, weigh(x)); };
}

// The sum of what `weigh` says of a list of n, and of NaN.
template <class A, class Weigh>
double sum_of(const A* list, int64_t n, const Weigh& weigh) {
  Total<A> total;
  for (int64_t begin = 0; begin < n; begin += kTile) {
    Vec<A> of_tile{};
    const int64_t end = begin + kTile < n ? begin + kTile : n;
    for (int64_t i = begin; i < end; i += kLanes<A>) of_tile += weigh(load(list + i));
    total.add(of_tile);
  }
  return total.sum();
}

// The largest number of a list that together with all above it weighs `least`; the smallest where
// all do not. By bisection; each step leaves in the list only what is between the bounds.
template <class A, class Weigh>
A lowest_of(A* list, int64_t n, double least, const Weigh& weigh) {
  int64_t low = 0, high = 0;
  const auto leave = [&](const auto& condition) {
    Vec<A> minima = splat(kInfinity<A>), maxima = splat(-kInfinity<A>);
    int64_t left = 0;
    for (int64_t i = 0; i < n; i += kLanes<A>) {
      const Vec<A> x = load(list + i);
      const Truth<A> left_in = condition(x);
      const Vec<A> lower = left_in ? x : splat(kInfinity<A>);
      const Vec<A> upper = left_in ? x : splat(-kInfinity<A>);
      minima = lower < minima ? lower : minima;
      maxima = larger(upper, maxima);
      left += append<A>(list + left, x, left_in);
    }
    n = left;
    end_list(list + n);
    low = ordered(-max_lanes<A>(-minima));
    high = ordered(max_lanes<A>(maxima));
  };
  leave([](Vec<A> x) { return x == x; });
  double above = 0;  // of those that are no longer in the list
  while (low < high) {
    // Above `low`, at most `high`, whose sum might overflow.
    const int64_t middle = (low >> 1) + (high >> 1) + (low & high & 1) + 1;
    const A bound = from_ordered<A>(middle);
    const double upper = sum_of(list, n, from(bound, weigh));
    // The bounds become numbers of the list; but they move even where denormal numbers equal 0.
    if (above + upper >= least) {
      leave([b = splat(bound)](Vec<A> x) { return x >= b; });
      low = low > middle ? low : middle;
    } else {
      above += upper;
      leave([b = splat(bound)](Vec<A> x) { return x < b; });
      high = high < middle ? high : middle - 1;
    }
  }
  return from_ordered<A>(low);
}

}  // namespace
}  // namespace ppo::PPO_ISA
