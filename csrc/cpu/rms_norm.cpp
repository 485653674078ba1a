// Root mean square norm of rows, each read from memory once, forward and backward.
//
//   r = 1 / sqrt(mean x_j^2 + eps),  y_j = x_j r w_j
//
// Backward, for gradients g of y; r is summed anew, in the same sweep as c, which takes less time
// than to read it would:
//
//   c    = mean g_j w_j x_j r
//   dx_j = (g_j w_j - x_j r c) r
//   dw_j = sum over the rows of g_j x_j r
//
// The last sum is taken of kNormRows rows at a time, and then of these parts, in order.
#include <algorithm>
#include <cmath>

#include "rows.h"
#include "sums_of_lanes.h"
#include "threads.h"

namespace ppo::PPO_ISA {
namespace {

constexpr int64_t kNumbersPerTask = 8192;  // of a forward pass
constexpr int64_t kColumns = 64;           // of the weight's gradient, at a time

// Vectors of a row: whole ones, and the last numbers.
struct Whole {
  template <class T> auto read(const T* p) const { return load(p); }
  template <class T, class V> void write(T* p, V x) const { store(p, x); }
};
struct Last {
  int64_t n;
  template <class T> auto read(const T* p) const { return load_first(p, n); }
  template <class T, class V> void write(T* p, V x) const { store_first(p, n, x); }
};

template <class A, class Body>
void for_vectors(int64_t width, const Body& body) {
  int64_t j = 0;
  for (; j + kLanes<A> <= width; j += kLanes<A>) body(Whole{}, j);
  if (j < width) body(Last{width - j}, j);
}

// The means over a row of what body(vector, j, sums, k) adds to sums[0][k], sums[1][k], … of it.
template <int count, class A, class Body>
void means(int64_t width, A (&found)[count], const Body& body) {
  constexpr int64_t one = kLanes<A>;
  Vec<A> sums[count][4] = {};
  int64_t j = 0;
  for (; j + 4 * one <= width; j += 4 * one) {
    for (int k = 0; k < 4; ++k) body(Whole{}, j + k * one, sums, k);
  }
  for (; j + one <= width; j += one) body(Whole{}, j, sums, 0);
  if (j < width) body(Last{width - j}, j, sums, 0);
  for (int i = 0; i < count; ++i) {
    A four[4] = {};
    add_sums_of_four<A>(sums[i], four);
    found[i] = ((four[0] + four[1]) + (four[2] + four[3])) / A(width);
  }
}

// The weight in the accumulation dtype, with what is added to it.
template <class A>
const A* accumulated_weight(const RmsNorm& args) {
  A* to = static_cast<A*>(args.scratch);
  with_dtype(args.weight_dtype, [&](auto zero) {
    using W = decltype(zero);
    const W* from = static_cast<const W*>(args.weight);
    for (int64_t j = 0; j < args.x.vocab; ++j) to[j] = A(widen(from[j])) + A(args.added);
  });
  return to;
}

template <class T, class Y, class A = Accumulator<T>>
void forward(const RmsNorm& args) {
  const A* weight = accumulated_weight<A>(args);
  const int64_t width = args.x.vocab, rows = std::max<int64_t>(kNumbersPerTask / width, 1);
  parallel_for((args.count + rows - 1) / rows, args.threads, [&](int64_t task) {
    for (int64_t i = task * rows; i < std::min((task + 1) * rows, args.count); ++i) {
      const T* x = logits_row<const T>(args.x, i);
      Y* y = static_cast<Y*>(args.y) + i * width;
      A square[1];
      means(width, square, [&](auto vector, int64_t j, auto& sums, int k) {
        const Vec<A> v = vector.read(x + j);
        sums[0][k] = multiply_add(v, v, sums[0][k]);
      });
      const Vec<A> r = splat(1 / std::sqrt(square[0] + A(args.eps)));
      for_vectors<A>(width, [&](auto vector, int64_t j) {
        vector.write(y + j, Vec<A>(vector.read(x + j) * r * vector.read(weight + j)));
      });
    }
  });
}

// The rows of a part: their gradients, and what they add to the weight's.
template <class T, class G, bool for_x, bool for_weight, class A = Accumulator<T>>
void backward(const RmsNorm& args, const A* weight, A* parts, int64_t part) {
  const int64_t width = args.x.vocab;
  A* sums_of_part = parts + part * width;
  if (for_weight) std::fill_n(sums_of_part, width, A(0));
  for (int64_t i = part * kNormRows; i < std::min((part + 1) * kNormRows, args.count); ++i) {
    const T* x = logits_row<const T>(args.x, i);
    const G* g = logits_row<const G>(args.grad_y, i);
    T* dx = static_cast<T*>(args.grad_x) + i * width;
    A of_row[2];  // the squares, and c / r
    means(width, of_row, [&](auto vector, int64_t j, auto& sums, int k) {
      const Vec<A> v = vector.read(x + j);
      sums[0][k] = multiply_add(v, v, sums[0][k]);
      if (for_x) {
        const Vec<A> gw = vector.read(g + j) * vector.read(weight + j);
        sums[1][k] = multiply_add(gw, v, sums[1][k]);
      }
    });
    const A inverse = 1 / std::sqrt(of_row[0] + A(args.eps));
    const Vec<A> r = splat(inverse), c = splat(of_row[1] * inverse);
    for_vectors<A>(width, [&](auto vector, int64_t j) {
      const Vec<A> v = vector.read(x + j) * r, of_y = vector.read(g + j);
      if (for_x) vector.write(dx + j, Vec<A>((of_y * vector.read(weight + j) - v * c) * r));
      if (for_weight) {
        A* sum = sums_of_part + j;
        vector.write(sum, multiply_add(of_y, v, Vec<A>(vector.read(sum))));
      }
    });
  }
}

// The parts of the weight's gradient, in order, in double.
template <class A>
void add_parts(const RmsNorm& args, const A* parts, int64_t count) {
  const int64_t width = args.x.vocab;
  parallel_for((width + kColumns - 1) / kColumns, args.threads, [&](int64_t task) {
    const int64_t first = task * kColumns, n = std::min(kColumns, width - first);
    double sums[kColumns] = {};
    for (int64_t part = 0; part < count; ++part) {
      for (int64_t j = 0; j < n; ++j) sums[j] += parts[part * width + first + j];
    }
    with_dtype(args.weight_dtype, [&](auto zero) {
      using W = decltype(zero);
      W* to = static_cast<W*>(args.grad_weight) + first;
      for (int64_t j = 0; j < n; ++j) narrow(Accumulator<W>(sums[j]), to[j]);
    });
  });
}

template <class T, class G, class A = Accumulator<T>>
void backward(const RmsNorm& args) {
  const A* weight = accumulated_weight<A>(args);
  A* parts = static_cast<A*>(args.scratch) + args.x.vocab;
  const int64_t count = (args.count + kNormRows - 1) / kNormRows;
  parallel_for(count, args.threads, [&](int64_t part) {
    if (args.grad_weight == nullptr) return backward<T, G, true, false>(args, weight, parts, part);
    if (args.grad_x == nullptr) return backward<T, G, false, true>(args, weight, parts, part);
    backward<T, G, true, true>(args, weight, parts, part);
  });
  if (args.grad_weight != nullptr) add_parts(args, parts, count);
}

// Calls body(T{}, U{}) with the storage types of x and of y, both float64 or neither.
template <class Body>
void with_dtypes(DType x, DType y, const Body& body) {
  with_dtype(x, [&](auto of_x) {
    with_dtype(y, [&](auto of_y) {
      using A = Accumulator<decltype(of_x)>;
      if constexpr (sizeof(A) == sizeof(Accumulator<decltype(of_y)>)) body(of_x, of_y);
    });
  });
}

}  // namespace

void rms_norm(const RmsNorm& args) {
  with_dtypes(args.x.dtype, args.y_dtype, [&](auto x, auto y) {
    forward<decltype(x), decltype(y)>(args);
  });
}

void rms_norm_backward(const RmsNorm& args) {
  with_dtypes(args.x.dtype, args.grad_y.dtype, [&](auto x, auto g) {
    backward<decltype(x), decltype(g)>(args);
  });
}

}  // namespace ppo::PPO_ISA
