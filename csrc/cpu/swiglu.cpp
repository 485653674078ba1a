// SwiGLU, each number read once and written once, forward and backward:
//
//   y = a s u  with s = sigmoid(a), a the gate and u what it lets through
//
// Backward, for gradients g of y; s is made anew of a, which has to be read anyway:
//
//   da = g u s (1 + a (1 - s)),  du = g a s
//
// 1 - s is sigmoid(-a): taken from 1, it would lose its digits where a is large. A task is so many
// numbers, of one row or of several.
#include "exp.h"
#include "rows.h"
#include "threads.h"

namespace ppo::PPO_ISA {
namespace {

constexpr int64_t kNumbersPerTask = 8192;  // a whole number of vectors

template <class A>
struct Sigmoid {
  Vec<A> of_x, of_minus;

  // By e^-|x|, which is 0 from kExpMax on; NaN stays.
  explicit Sigmoid(Vec<A> x) {
    const Bits<A> sign = bit_cast<Bits<A>>(splat(A(-0.0)));
    const Vec<A> below = bit_cast<Vec<A>>(bit_cast<Bits<A>>(x) | sign), least = splat(-kExpMax<A>);
    const Vec<A> e = exp_bounded<A>(below < least ? least : below);
    const Vec<A> of_size = A(1) / (e + A(1)), rest = e * of_size;
    of_x = x < A(0) ? rest : of_size;
    of_minus = x < A(0) ? of_size : rest;
  }
};

// Calls body(row, first, count) for each piece of a row in a task.
template <class Body>
void for_pieces(const SwiGLU& args, const Body& body) {
  const int64_t width = args.gate.vocab, all = args.count * width;
  parallel_for((all + kNumbersPerTask - 1) / kNumbersPerTask, args.threads, [&](int64_t task) {
    const int64_t end = smaller((task + 1) * kNumbersPerTask, all);
    for (int64_t i = task * kNumbersPerTask; i < end;) {
      const int64_t row = i / width, first = i % width, count = smaller(width - first, end - i);
      body(row, first, count);
      i += count;
    }
  });
}

// Vectors of T, two at a time, in whichever order load_two has: the same for all tensors.
template <class T>
struct Two {
  Vec<Accumulator<T>> a, b;

  explicit Two(const T* p) { load_two(p, a, b); }
};

template <class T>
void forward(const SwiGLU& args) {
  using A = Accumulator<T>;
  const auto gated = [](Vec<A> gate, Vec<A> up) { return gate * Sigmoid<A>(gate).of_x * up; };
  for_pieces(args, [&](int64_t row, int64_t first, int64_t count) {
    const T* gate = logits_row<const T>(args.gate, row) + first;
    const T* up = logits_row<const T>(args.up, row) + first;
    T* y = static_cast<T*>(args.y) + row * args.gate.vocab + first;
    int64_t j = 0;
    for (; j + 2 * kLanes<A> <= count; j += 2 * kLanes<A>) {
      const Two<T> g(gate + j), u(up + j);
      store_two(y + j, gated(g.a, u.a), gated(g.b, u.b));
    }
    for (; j < count; j += kLanes<A>) {
      const int64_t n = smaller(count - j, kLanes<A>);
      store_first(y + j, n, gated(load_first(gate + j, n), load_first(up + j, n)));
    }
  });
}

// The gradients of a vector.
template <class A>
struct Gradients {
  Vec<A> of_gate, of_up;

  Gradients(Vec<A> of_y, Vec<A> gate, Vec<A> up) {
    const Sigmoid<A> s(gate);
    of_gate = of_y * up * (s.of_x * multiply_add(gate, s.of_minus, splat(A(1))));
    of_up = of_y * (gate * s.of_x);
  }
};

template <class T, bool for_gate, bool for_up>
void backward(const SwiGLU& args) {
  using A = Accumulator<T>;
  for_pieces(args, [&](int64_t row, int64_t first, int64_t count) {
    const T* of_y = logits_row<const T>(args.grad_y, row) + first;
    const T* gate = logits_row<const T>(args.gate, row) + first;
    const T* up = for_gate ? logits_row<const T>(args.up, row) + first : of_y;
    const int64_t place = row * args.gate.vocab + first;
    T* of_gate = static_cast<T*>(args.grad_gate) + place;
    T* of_up = static_cast<T*>(args.grad_up) + place;
    int64_t j = 0;
    for (; j + 2 * kLanes<A> <= count; j += 2 * kLanes<A>) {
      const Two<T> d(of_y + j), g(gate + j), u(up + j);
      const Gradients<A> a(d.a, g.a, u.a), b(d.b, g.b, u.b);
      if (for_gate) store_two(of_gate + j, a.of_gate, b.of_gate);
      if (for_up) store_two(of_up + j, a.of_up, b.of_up);
    }
    for (; j < count; j += kLanes<A>) {
      const int64_t n = smaller(count - j, kLanes<A>);
      const Gradients<A> found(load_first(of_y + j, n), load_first(gate + j, n),
                               load_first(up + j, n));
      if (for_gate) store_first(of_gate + j, n, found.of_gate);
      if (for_up) store_first(of_up + j, n, found.of_up);
    }
  });
}

}  // namespace

void swiglu(const SwiGLU& args) {
  with_dtype(args.gate.dtype, [&](auto zero) { forward<decltype(zero)>(args); });
}

void swiglu_backward(const SwiGLU& args) {
  with_dtype(args.gate.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (args.grad_up == nullptr) return backward<T, true, false>(args);
    if (args.grad_gate == nullptr) return backward<T, false, true>(args);
    backward<T, true, true>(args);
  });
}

}  // namespace ppo::PPO_ISA
