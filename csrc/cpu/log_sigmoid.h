// -log sigmoid(x) = max(-x, 0) + log(1 + e^-|x|), whose derivative by x is -sigmoid(-x).
// Anonymous namespace: see ops.h.
#pragma once

#include "exp.h"
#include "tiles.h"

namespace ppo::PPO_ISA {
namespace {

// e^-|x|, in [0, 1]: exactly 0 from kExpMax on.
template <class A>
inline Vec<A> exp_minus_magnitude(Vec<A> x) {
  const Vec<A> size = magnitude<A>(x), limit = splat(kExpMax<A>);
  return exp_bounded<A>(-(size > limit ? limit : size));
}

// sigmoid(-x), where e is e^-|x|.
template <class A>
inline Vec<A> sigmoid_of_minus(Vec<A> x, Vec<A> e) {
  return (x < A(0) ? splat(A(1)) : e) / (e + A(1));
}

// Minimax (Remez) for atanh(sqrt w) / sqrt w on 0 <= w <= 1/9, to 2^-28 and 2^-59.
template <class A> constexpr A kAtanh[] = {A(0)};
template <>
constexpr float kAtanh<float>[] = {1.0000000039605129781f, 0.33333157341100187853f,
                                   0.2001245513664655036f, 0.13980301446420738036f,
                                   0.14089167122724495627f};
template <>
constexpr double kAtanh<double>[] = {
    1.0000000000000000012, 0.33333333333333067102, 0.20000000000095167061, 0.14285714272462141048,
    0.11111112055907977386, 0.09090869893233185709, 0.076933177385639398109, 0.066500511247085687636,
    0.060561254090654201388, 0.041578385290059707772, 0.085300373642613955566};

// log(1 + x) for 0 <= x <= 1, as 2 atanh(s) with s = x / (2 + x): small x lose nothing.
template <class A>
inline Vec<A> log1p_unit(Vec<A> x) {
  const Vec<A> s = x / (x + A(2));
  return (s + s) * polynomial(Vec<A>(s * s), kAtanh<A>);
}

// The same for x from 0 to below 2^126 in float, 2^1022 in double, where 2^-n is a normal number:
// 1 + x = 2^n (1 + f) with f in [0, 1], n ln 2 + log(1 + f). Below 1, f is x itself.
template <class A>
inline Vec<A> log1p_positive(Vec<A> x) {
  using C = ExpConstants<A>;
  const Bits<A> n = (bit_cast<Bits<A>>(Vec<A>(x + A(1))) >> C::kMantissa) - C::kBias;
  const Vec<A> down = bit_cast<Vec<A>>((C::kBias - n) << C::kMantissa);  // 2^-n
  const Vec<A> f = multiply_add(x, down, Vec<A>(down - A(1)));
  return __builtin_convertvector(Truth<A>(n), Vec<A>) * A(0.69314718055994530942) +
         log1p_unit<A>(f);
}

}  // namespace
}  // namespace ppo::PPO_ISA
