// The vector exponentials of csrc/cpu/exp.h against the C library, over all of their range: prints
// the largest error of each, in units in the last place (ulp) of the exact result.
#include <cmath>
#include <cstdio>
#include <limits>

#include "exp.h"

namespace ppo::PPO_ISA {
namespace {

template <class A> struct Wider;
template <> struct Wider<float> { using Type = double; };
template <> struct Wider<double> { using Type = long double; };

// Calls visit(x) for numbers of both signs from 2^-60 up to `most`: of each binary exponent the same
// number, evenly spaced, with the ends.
template <class A, class Visit>
void numbers(A most, int per_exponent, const Visit& visit) {
  for (A sign = -1; sign <= 1; sign += 2) {
    visit(sign * A(0));
    visit(sign * most);
    for (int exponent = -60; std::ldexp(A(1), exponent) <= most; ++exponent) {
      for (int i = 0; i < per_exponent; ++i) {
        const A x = std::ldexp(A(1) + A(i) / A(per_exponent), exponent);
        if (x <= most) visit(sign * x);
      }
    }
  }
}

// The largest error of `got(x)` against `exact(x)`. Below the normal numbers, 0 will do.
template <class A, class Got, class Exact>
void measure(const char* name, A most, const Got& got, const Exact& exact) {
  using W = typename Wider<A>::Type;
  using Limits = std::numeric_limits<A>;
  W worst = 0;
  numbers<A>(most, 10007, [&](A x) {
    const W wanted = exact(W(x)), found = got(splat(x))[0];
    const W size = std::fabs(wanted) < Limits::min() ? W(Limits::min()) / Limits::epsilon()
                                                     : std::fabs(wanted);
    const W ulp = std::ldexp(W(1), std::ilogb(size) - (Limits::digits - 1));
    const W error = std::fabs(found - wanted) / ulp;
    if (!(error <= worst)) worst = error;  // NaN too
  });
  std::printf("%s %.3Lf\n", name, static_cast<long double>(worst));
}

// 2^(c x - R) for a c and an R as a temperature and a far maximum bring them, over all of the range.
template <class A>
void measure_exp2(const char* name, double temperature, int r) {
  using W = typename Wider<A>::Type;
  const A c = A(1.4426950408889634 / temperature);
  const A most = A(ExpConstants<A>::kBias) / c * A(0.999);
  const Exp2<A> power(c, A(r));
  const A shift = A(r) / c;
  measure<A>(name, most, [&](Vec<A> x) { return power(x + shift); },
             [&](W x) {
               x = A(A(x) + shift);
               const W n = std::nearbyint(W(c) * x - r);
               return std::ldexp(std::exp2(std::fma(W(c), x, -n - r)), int(n));
             });
}

void measure_all() {
  measure<float>("exp float", kExpMax<float>, exp_bounded<float>,
                 [](double x) { return std::exp(x); });
  measure<double>("exp double", kExpMax<double>, exp_bounded<double>,
                  [](long double x) { return std::exp(x); });
  measure<float>("expm1 float", kExpMax<float>, expm1_bounded<float>,
                 [](double x) { return std::expm1(x); });
  measure<double>("expm1 double", kExpMax<double>, expm1_bounded<double>,
                  [](long double x) { return std::expm1(x); });
  measure_exp2<float>("exp2 float", 1, 0);
  measure_exp2<float>("exp2 float, hot", 0.01, 0);
  measure_exp2<double>("exp2 double", 1, 0);
  if (kFused) {
    measure_exp2<float>("exp2 float, far", 0.7, 100000);
    measure_exp2<double>("exp2 double, far", 0.7, 100000);
  }
}

}  // namespace
}  // namespace ppo::PPO_ISA

int main() { ppo::PPO_ISA::measure_all(); }
