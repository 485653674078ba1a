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
#include <cmath>

#include "rows.h"
#include "sums_of_lanes.h"
#include "threads.h"

namespace ppo::PPO_ISA {
namespace {

constexpr int64_t kNumbersPerTask = 8192;  // of a forward pass
constexpr int64_t kBlock = 1024;           // of a row, whose sums are then added in double
constexpr int64_t kColumns = 64;           // of the weight's gradient, at a time

// Two vectors of a row.
template <class A>
struct Two {
  Vec<A> a, b;
};
template <class A> Two<A> operator*(Two<A> x, Two<A> y) { return {x.a * y.a, x.b * y.b}; }
template <class A> Two<A> operator+(Two<A> x, Two<A> y) { return {x.a + y.a, x.b + y.b}; }
template <class A> Two<A> operator-(Two<A> x, Two<A> y) { return {x.a - y.a, x.b - y.b}; }
template <class A> Two<A> both(A x) { return {splat(x), splat(x)}; }
template <class A>
Two<A> multiply_add(Two<A> x, Two<A> y, Two<A> z) {
  return {multiply_add(x.a, y.a, z.a), multiply_add(x.b, y.b, z.b)};
}

// In which order two vectors are read: that of load_two where x and y are of one dtype, else that
// of memory. What is in scratch lies in the same order.
template <class T, class Y, class A = Accumulator<T>>
using OrderOf = typename Either<kSame<T, Y>, T, A>::type;

template <class Order, class A = Accumulator<Order>>
struct Whole {
  template <class T>
  Two<A> read(const T* p) const {
    if constexpr (!kSame<T, Order>) return {load(p), load(p + kLanes<A>)};
    Two<A> x;
    load_two(p, x.a, x.b);
    return x;
  }
  template <class T>
  void write(T* p, Two<A> x) const {
    if constexpr (kSame<T, Order>) return store_two(p, x.a, x.b);
    store(p, x.a);
    store(p + kLanes<A>, x.b);
  }
};

// The last numbers of a row, in the order of memory.
template <class A>
struct Last {
  int64_t n;
  int64_t of_a() const { return smaller(n, kLanes<A>); }
  template <class T>
  Two<A> read(const T* p) const {
    return {load_first(p, of_a()), load_first(p + kLanes<A>, n - of_a())};
  }
  template <class T>
  void write(T* p, Two<A> x) const {
    store_first(p, of_a(), x.a);
    store_first(p + kLanes<A>, n - of_a(), x.b);
  }
};

template <class Order, class Body>
void for_vectors(int64_t width, const Body& body) {
  using A = Accumulator<Order>;
  int64_t j = 0;
  for (; j + 2 * kLanes<A> <= width; j += 2 * kLanes<A>) body(Whole<Order>{}, j);
  if (j < width) body(Last<A>{width - j}, j);
}

// The means over a row of what body(vectors, j, sums, k) adds to sums[0][k], sums[1][k], … of it.
template <class Order, int count, class A, class Body>
void means(int64_t width, A (&found)[count], const Body& body) {
  constexpr int64_t two = 2 * kLanes<A>;
  double totals[count] = {};
  for (int64_t j = 0; j < width;) {
    const int64_t end = smaller(j + kBlock, width);
    Two<A> sums[count][2] = {};
    for (; j + 2 * two <= end; j += 2 * two) {
      body(Whole<Order>{}, j, sums, 0);
      body(Whole<Order>{}, j + two, sums, 1);
    }
    for_vectors<Order>(end - j, [&](auto vectors, int64_t k) { body(vectors, j + k, sums, 0); });
    j = end;
    for (int i = 0; i < count; ++i) {
      const Vec<A> vectors[] = {sums[i][0].a, sums[i][0].b, sums[i][1].a, sums[i][1].b};
      A four[4] = {};
      add_sums_of_four<A>(vectors, four);
      totals[i] += double((four[0] + four[1]) + (four[2] + four[3]));
    }
  }
  for (int i = 0; i < count; ++i) found[i] = A(totals[i]) / A(width);
}

// Where in memory number j of a row is that lies at j in scratch.
template <class Order>
int64_t place(int64_t j, int64_t width) {
  constexpr int one = kLanes<Accumulator<Order>>;
  const int64_t first = j / (2 * one) * (2 * one), l = j - first;
  if (first + 2 * one > width) return j;
  return first + l % one * kStepOfTwo<Order> + l / one * kSecondOfTwo<Order>;
}

// The weight in the accumulation dtype, with what is added to it.
template <class Order, class A = Accumulator<Order>>
const A* accumulated_weight(const RmsNorm& args) {
  A* to = static_cast<A*>(args.scratch);
  const int64_t width = args.x.vocab;
  with_dtype(args.weight_dtype, [&](auto zero) {
    using W = decltype(zero);
    const W* from = static_cast<const W*>(args.weight);
    constexpr bool as_it_lies = kStepOfTwo<Order> == 1 || kSame<W, Order>;
    if constexpr (as_it_lies && kSame<Accumulator<W>, A>) {
      for_vectors<Order>(width, [&](auto vectors, int64_t j) {
        vectors.write(to + j, vectors.read(from + j) + both(A(args.added)));
      });
    } else {
      for (int64_t j = 0; j < width; ++j) {
        to[j] = A(widen(from[place<Order>(j, width)])) + A(args.added);
      }
    }
  });
  return to;
}

template <class T, class Y>
void forward(const RmsNorm& args) {
  using Order = OrderOf<T, Y>;
  using A = Accumulator<T>;
  const A* weight = accumulated_weight<Order>(args);
  const int64_t width = args.x.vocab, rows = width < kNumbersPerTask ? kNumbersPerTask / width : 1;
  parallel_for((args.count + rows - 1) / rows, args.threads, [&](int64_t task) {
    for (int64_t i = task * rows; i < smaller((task + 1) * rows, args.count); ++i) {
      const T* x = logits_row<const T>(args.x, i);
      Y* y = static_cast<Y*>(args.y) + i * width;
      A square[1];
      means<Order>(width, square, [&](auto vectors, int64_t j, auto& sums, int k) {
        const Two<A> v = vectors.read(x + j);
        sums[0][k] = multiply_add(v, v, sums[0][k]);
      });
      const Two<A> r = both(1 / std::sqrt(square[0] + A(args.eps)));
      for_vectors<Order>(width, [&](auto vectors, int64_t j) {
        vectors.write(y + j, vectors.read(x + j) * r * vectors.read(weight + j));
      });
    }
  });
}

// The rows of a part: their gradients, and what they add to the weight's.
template <class T, class G, bool for_x, bool for_weight, class A = Accumulator<T>>
void backward(const RmsNorm& args, const A* weight, A* parts, int64_t part) {
  using Order = OrderOf<T, G>;
  const int64_t width = args.x.vocab;
  A* sums_of_part = parts + part * width;
  for (int64_t j = 0; for_weight && j < width; ++j) sums_of_part[j] = A(0);
  for (int64_t i = part * kNormRows; i < smaller((part + 1) * kNormRows, args.count); ++i) {
    const T* x = logits_row<const T>(args.x, i);
    const G* g = logits_row<const G>(args.grad_y, i);
    T* dx = static_cast<T*>(args.grad_x) + i * width;
    A of_row[2];  // of the squares, and c / r
    means<Order>(width, of_row, [&](auto vectors, int64_t j, auto& sums, int k) {
      const Two<A> v = vectors.read(x + j);
      sums[0][k] = multiply_add(v, v, sums[0][k]);
      if (for_x) {
        const Two<A> gw = vectors.read(g + j) * vectors.read(weight + j);
        sums[1][k] = multiply_add(gw, v, sums[1][k]);
      }
    });
    const A inverse = 1 / std::sqrt(of_row[0] + A(args.eps));
    const Two<A> r = both(inverse), c = both(of_row[1] * inverse);
    for_vectors<Order>(width, [&](auto vectors, int64_t j) {
      const Two<A> v = vectors.read(x + j) * r, of_y = vectors.read(g + j);
      if (for_x) vectors.write(dx + j, (of_y * vectors.read(weight + j) - v * c) * r);
      if (for_weight) {
        const Two<A> sum = vectors.read(sums_of_part + j);
        vectors.write(sums_of_part + j, multiply_add(of_y, v, sum));
      }
    });
  }
}

// The parts of the weight's gradient, in order, in double.
template <class Order, class A>
void add_parts(const RmsNorm& args, const A* parts, int64_t count) {
  const int64_t width = args.x.vocab;
  parallel_for((width + kColumns - 1) / kColumns, args.threads, [&](int64_t task) {
    const int64_t first = task * kColumns, n = smaller(kColumns, width - first);
    double sums[kColumns] = {};
    for (int64_t part = 0; part < count; ++part) {
      for (int64_t j = 0; j < n; ++j) sums[j] += parts[part * width + first + j];
    }
    with_dtype(args.weight_dtype, [&](auto zero) {
      using W = decltype(zero);
      W* to = static_cast<W*>(args.grad_weight);
      for (int64_t j = 0; j < n; ++j) {
        narrow(Accumulator<W>(sums[j]), to[place<Order>(first + j, width)]);
      }
    });
  });
}

template <class T, class G, class A = Accumulator<T>>
void backward(const RmsNorm& args) {
  using Order = OrderOf<T, G>;
  const A* weight = accumulated_weight<Order>(args);
  A* parts = static_cast<A*>(args.scratch) + args.x.vocab;
  const int64_t count = (args.count + kNormRows - 1) / kNormRows;
  parallel_for(count, args.threads, [&](int64_t part) {
    if (args.grad_weight == nullptr) return backward<T, G, true, false>(args, weight, parts, part);
    if (args.grad_x == nullptr) return backward<T, G, false, true>(args, weight, parts, part);
    backward<T, G, true, true>(args, weight, parts, part);
  });
  if (args.grad_weight != nullptr) add_parts<Order>(args, parts, count);
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
