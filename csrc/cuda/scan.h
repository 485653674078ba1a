// The carry of GAE as a scan, and moments that merge: what a thread computes, and in which order.
#pragma once

#include "dtypes.h"

namespace ppo::cuda {

// What tokens do to the carry at their right, x -> a x + u.
struct Affine { double a, u; };

PPO_BOTH inline Affine identity() { return {1, 0}; }
PPO_BOTH inline double apply(Affine f, double carry) { return f.a * carry + f.u; }
PPO_BOTH inline Affine then(Affine right, Affine left) {
  return {left.a * right.a, left.a * right.u + left.u};
}

// c_t = gamma V_t + gamma lam A_t with A_t = r_t - V_t + c_{t+1}, and r_t = by x_t: what a token does
// to the carry is x -> gamma lam x + u_t. A masked one, whose x and V are given as 0, passes it on
// as is.
struct Token {
  double gamma_lam;  // 1 of a masked one
  double u;
  double value, reward;
};

struct Discounts {
  double gamma_lam, u_of_x, u_of_value, by;

  PPO_BOTH Discounts(double gamma, double gamma_lam, double by)
      : gamma_lam(gamma_lam), u_of_x(gamma_lam * by), u_of_value(gamma - gamma_lam), by(by) {}
  PPO_BOTH Token token(bool real, double x, double value) const {
    return {real ? gamma_lam : 1.0, u_of_x * x + u_of_value * value, value, by * x};
  }
};

PPO_BOTH inline Affine then(Affine right, Token left) {
  return {left.gamma_lam * right.a, left.gamma_lam * right.u + left.u};
}

// A_t of a real token; `carry` goes from its right to its left.
PPO_BOTH inline double advantage_of(Token t, double& carry) {
  const double advantage = t.reward + carry - t.value;
  carry = t.gamma_lam * carry + t.u;
  return advantage;
}

// Count of some numbers, their sum and that of their squares, about an origin: one of them, so that
// a large mean cancels nothing.
struct Sums {
  double count, origin, sum, squares;
};

PPO_BOTH inline Sums merged(Sums x, Sums y) {
  const double origin = x.count > 0 ? x.origin : y.origin;
  const double d = y.count > 0 ? y.origin - origin : 0;
  return {x.count + y.count, origin, x.sum + (y.sum + y.count * d),
          x.squares + (y.squares + d * (2 * y.sum + y.count * d))};
}

struct Moments { double count, mean, m2; };

PPO_BOTH inline Moments moments_of(Sums x) {
  if (x.count == 0) return {0, 0, 0};
  const double shift = x.sum / x.count, m2 = x.squares - x.sum * shift;
  return {x.count, x.origin + shift, m2 < 0 ? 0 : m2};  // NaN stays
}

}  // namespace ppo::cuda
