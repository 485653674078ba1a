// The sums of the lanes of four vectors at once. Anonymous namespace: see ops.h.
#pragma once

#include "simd.h"

namespace ppo::PPO_ISA {
namespace {

template <class A> using LanesOf = typename UpTo<kLanes<A>>::Type;

// Lane l of the result is lane Place::of(l) of a and b, side by side.
template <class A, class Place, int... l>
inline Vec<A> shuffled(Vec<A> a, Vec<A> b, Place, Indices<l...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, Place::of(l)...);
#else
  return __builtin_shuffle(a, b, Bits<A>{Place::of(l)...});
#endif
}

// Of each run of 2 n lanes the lower n (or, with `upper`, the upper n), of a, then of b.
template <class A, int n, bool upper>
struct Half {
  static constexpr int of(int l) {
    return l / (2 * n) * (2 * n) + l % n + (upper ? n : 0) + (l / n % 2 ? kLanes<A> : 0);
  }
};
template <int n, class A>
inline Vec<A> folded(Vec<A> a, Vec<A> b) {
  return shuffled<A>(a, b, Half<A, n, false>{}, LanesOf<A>{}) +
         shuffled<A>(a, b, Half<A, n, true>{}, LanesOf<A>{});
}

template <class A, int n>
struct Down {
  static constexpr int of(int l) { return (l + n) % kLanes<A>; }
};
// Adds to the lowest lane of each run of 2 n that n above it, as to others.
template <int n, class A>
inline Vec<A> folded(Vec<A> x) {
  return x + shuffled<A>(x, x, Down<A, n>{}, LanesOf<A>{});
}

// The lowest lane of each quarter, of which the middle ones changed places.
template <class A>
struct Quarters {
  static constexpr int of(int l) { return (l % 2 * 2 + l / 2 % 2) * (kLanes<A> / 4); }
};

// Adds the sums of the lanes of four vectors to four numbers.
template <class A>
inline void add_sums_of_four(const Vec<A>* x, A* to) {
  constexpr int n = kLanes<A>;
  A sums[4];
  if constexpr (n < 4) {
    for (int k = 0; k < 4; ++k) sums[k] = A(sum_lanes<A>(x[k]));
  } else {
    Vec<A> four = folded<n / 4, A>(folded<n / 2, A>(x[0], x[1]), folded<n / 2, A>(x[2], x[3]));
    if constexpr (n >= 16) four = folded<n / 8, A>(four);
    if constexpr (n >= 8) four = folded<(n < 16 ? n / 8 : n / 16), A>(four);
    four = shuffled<A>(four, four, Quarters<A>{}, LanesOf<A>{});
    std::memcpy(sums, &four, sizeof(sums));
  }
  for (int k = 0; k < 4; ++k) to[k] += sums[k];
}

}  // namespace
}  // namespace ppo::PPO_ISA
