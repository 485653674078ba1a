// Rotary position embedding of query and key, each read once and written once:
//
//   y_i = x_i cos_i - x_{i+h} sin_i,  y_{i+h} = x_{i+h} cos_{i+h} + x_i sin_{i+h},  i < h
//
// where h is half of what is rotated; the rest is copied. Its transpose, which makes the gradients,
// is the same with -sin_{i+h} in the place of sin_i, and the other way round.
//
// A task is some tokens. What a token is rotated by is widened once, for all of its heads.
#include "simd.h"
#include "threads.h"

namespace ppo::PPO_ISA {
namespace {

constexpr int64_t kPairs = 256;  // of a token's numbers at a time
constexpr int64_t kNumbersPerTask = 16384;
constexpr int64_t kPrefetchBytes = 4096;

template <class A>
struct Angles {
  A cos[2][kPairs], sin[2][kPairs];  // of both halves; beyond those in use, anything
};

// `count` of a token's cosines or sines from `first` on, `half` apart, times `sign`.
template <class A>
void read_angles(const RotaryEmbedding& args, const Tokens& x, int64_t row, int64_t token,
                 int64_t first, int64_t count, A sign, A* of_first, A* of_second) {
  with_dtype(args.angles_dtype, [&](auto zero) {
    using C = decltype(zero);
    const C* from = static_cast<const C*>(x.data) + row * x.row_stride + token * x.stride + first;
    const int64_t half = args.rotated / 2;
    for (int64_t i = 0; i < count; ++i) of_first[i] = sign * A(widen(from[i]));
    for (int64_t i = 0; i < count; ++i) of_second[i] = sign * A(widen(from[half + i]));
  });
}

// `count` pairs of numbers, `half` apart.
template <class T, class A>
void rotate(const T* x, int64_t half, int64_t count, const Angles<A>& angles, T* y) {
  const auto rotate_vector = [&](Vec<A>& a, Vec<A>& b, int64_t i) {
    const Vec<A> before = a;
    a = multiply_add(a, load(angles.cos[0] + i), Vec<A>(-b * load(angles.sin[0] + i)));
    b = multiply_add(b, load(angles.cos[1] + i), Vec<A>(before * load(angles.sin[1] + i)));
  };
  int64_t i = 0;
  for (; i + kLanes<A> <= count; i += kLanes<A>) {
    Vec<A> a = load(x + i), b = load(x + half + i);
    rotate_vector(a, b, i);
    store(y + i, a);
    store(y + half + i, b);
  }
  if (const int64_t n = count - i; n > 0) {
    Vec<A> a = load_first(x + i, n), b = load_first(x + half + i, n);
    rotate_vector(a, b, i);
    store_first(y + i, n, a);
    store_first(y + half + i, n, b);
  }
}

// The processor's own prefetching begins anew in each token's heads, and does not see what is written.
// In line, as GCC 12 leaves out calls of a function that does nothing else.
template <class T>
__attribute__((always_inline)) inline void prefetch(const T* x, const T* y, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / int64_t(sizeof(T))) {
    __builtin_prefetch(x + i);
    __builtin_prefetch(y + i, 1);
  }
}

// The pairs [first, first + count) of all heads of a token; with the first, what is only copied.
template <class T, class A>
void rotate_heads(const RotaryEmbedding& args, const RotatedHeads& heads, int64_t row,
                  int64_t token, int64_t first, int64_t count, const Angles<A>& angles) {
  const int64_t of_token = heads.count * args.width, rest = args.width - args.rotated;
  const T* x = static_cast<const T*>(heads.from.data) + row * heads.from.row_stride +
               token * heads.from.token_stride;
  T* y = static_cast<T*>(heads.to) + (row * args.tokens + token) * of_token;
  const int64_t ahead = 1 + kPrefetchBytes / (of_token * int64_t(sizeof(T)) + 1);  // tokens
  for (int64_t h = 0; h < heads.count; ++h) {
    if (first == 0) {
      prefetch(x + ahead * heads.from.token_stride, y + ahead * of_token, args.width);
      if (rest > 0) std::memcpy(y + args.rotated, x + args.rotated, size_t(rest) * sizeof(T));
    }
    rotate(x + first, args.rotated / 2, count, angles, y + first);
    x += heads.from.head_stride;
    y += args.width;
  }
}

template <class T, class A = Accumulator<T>>
void rotate_token(const RotaryEmbedding& args, int64_t row, int64_t token) {
  const int64_t half = args.rotated / 2;
  Angles<A> angles;
  int64_t first = 0;
  do {
    const int64_t count = half - first < kPairs ? half - first : kPairs;
    read_angles(args, args.cos, row, token, first, count, A(1), angles.cos[0], angles.cos[1]);
    if (args.transposed) {
      read_angles(args, args.sin, row, token, first, count, A(-1), angles.sin[1], angles.sin[0]);
    } else {
      read_angles(args, args.sin, row, token, first, count, A(1), angles.sin[0], angles.sin[1]);
    }
    rotate_heads<T>(args, args.query, row, token, first, count, angles);
    rotate_heads<T>(args, args.key, row, token, first, count, angles);
    first += kPairs;
  } while (first < half);
}

}  // namespace

void rotary_embedding(const RotaryEmbedding& args) {
  const int64_t numbers = (args.query.count + args.key.count) * args.width;
  if (numbers == 0) return;
  const int64_t tokens = args.rows * args.tokens;
  const int64_t of_task = numbers < kNumbersPerTask ? kNumbersPerTask / numbers : 1;
  with_dtype(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    parallel_for((tokens + of_task - 1) / of_task, args.threads, [&](int64_t task) {
      for (int64_t i = task * of_task; i < (task + 1) * of_task && i < tokens; ++i) {
        rotate_token<T>(args, i / args.tokens, i % args.tokens);
      }
    });
  });
}

}  // namespace ppo::PPO_ISA
