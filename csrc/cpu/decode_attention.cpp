// Attention of one query per row and head over the row's keys and values, each read once.
//
//   z_j = scale q k_j, or c tanh of that / c;  m = max z_j;  l = sum e^{z_j - m}
//   o   = sum e^{z_j - m} v_j / l,  the sink one more term of l
//
// A task is a piece of a row's keys and values with the query heads that share them, up to kTile
// together: what is in a register serves all of them. Where a row has several pieces, m, l and the
// sum above l are kept of each, and merged in order. A row's new key and value, where given, are
// written into its last place before that is read.
#include <cmath>

#include "exp.h"
#include "sums_of_lanes.h"
#include "threads.h"

namespace ppo::PPO_ISA {
namespace {

// So many heads that their sums over kKeys keys, or over kPairs pairs of vectors of values, fit the
// registers.
#if defined(__AVX512F__)
constexpr int kTile = 4, kPairs = 2;
#else
constexpr int kTile = 3, kPairs = 1;
#endif
constexpr int kKeys = 4;
constexpr int64_t kColumns = 512;  // of the queries at a time
constexpr int64_t kPrefetchBytes = 8192;
constexpr double kLog2E = 1.4426950408889634074;

template <class A> constexpr A kInfinity = A(__builtin_huge_val());
template <int n> struct Constant { static constexpr int value = n; };

// Prefetches what lies kPrefetchBytes behind 2 kLanes numbers, or, where that is beyond `end`, as
// far behind `then`: the processor's own prefetching stops at the end of a page, and a row has few.
// In line, as GCC 12 leaves out calls of a function that does nothing else.
template <class T>
__attribute__((always_inline)) inline void prefetch(const T* from, const T* end, const T* then) {
  const T* ahead = from + kPrefetchBytes / sizeof(T);
  ahead = ahead < end ? ahead : then + (ahead - end);
  for (int b = 0; b < 2 * kLanes<Accumulator<T>>; b += 64 / int(sizeof(T))) {
    __builtin_prefetch(ahead + b);
  }
}

// `count` numbers in a room of more.
template <class T>
inline const T* copied(const T* from, int64_t count, T* room) {
  for (int64_t i = 0; i < count; ++i) room[i] = from[i];
  return room;
}

// What a task works on.
template <class A>
struct Room {
  A query[kTile][kColumns];   // times the scale, in the order of load_two, zeros behind
  A z[kTile][kKeysPerPiece];  // logits of the keys, then e^{z - m}
  A m[kTile], sum[kTile];
};

// The columns [first, first + count) of the queries of some heads.
template <class K, class A>
void read_queries(const DecodeAttention& args, int64_t row, int64_t head, int tile, int64_t first,
                  int64_t count, Room<A>& room) {
  constexpr int one = kLanes<A>, step = kStepOfTwo<K>, second = kSecondOfTwo<K>;
  const A scale = A(args.scale);
  with_dtype(args.query_dtype, [&](auto zero) {
    using Q = decltype(zero);
    for (int g = 0; g < tile; ++g) {
      const Q* from = static_cast<const Q*>(args.query.data) + row * args.query.row_stride +
                      (head + g) * args.query.head_stride + first;
      A* to = room.query[g];
      Q last[2 * one] = {};
      for (int64_t c = 0; c < count; c += 2 * one) {
        const Q* two = from + c;
        if (count - c < 2 * one) two = copied(two, count - c, last);
        for (int i = 0; i < one; ++i) {
          to[c + i] = scale * A(widen(two[i * step]));
          to[c + one + i] = scale * A(widen(two[i * step + second]));
        }
      }
    }
  });
}

// Adds q k to the logits of `count` keys, for those columns.
template <int tile, class K, class A>
void add_logits(const K* keys, int64_t stride, int64_t count, int64_t columns, const K* values,
                Room<A>& room) {
  constexpr int one = kLanes<A>;
  const K* const end = keys + count * stride;
  const int64_t whole = columns / (2 * one) * (2 * one), rest = columns - whole;
  K last[kKeys][2 * one] = {};
  for (int64_t j = 0; j < count; j += kKeys) {
    const K* key[kKeys];  // the last one again, where there are no more: its logit is not used
    for (int k = 0; k < kKeys; ++k) key[k] = keys + (j + k < count ? j + k : count - 1) * stride;
    Vec<A> sums[tile][kKeys];
    for (int g = 0; g < tile; ++g) {
      for (int k = 0; k < kKeys; ++k) sums[g][k] = Vec<A>{};
    }
    const auto add_two = [&](const K* const* from, int64_t at, int64_t c) {
      for (int k = 0; k < kKeys; ++k) {
        Vec<A> a, b;
        prefetch(from[k] + at, end, values);
        load_two(from[k] + at, a, b);
        for (int g = 0; g < tile; ++g) {
          sums[g][k] = multiply_add(a, load(room.query[g] + c), sums[g][k]);
          sums[g][k] = multiply_add(b, load(room.query[g] + c + one), sums[g][k]);
        }
      }
    };
    for (int64_t c = 0; c < whole; c += 2 * one) add_two(key, c, c);
    if (rest > 0) {
      for (int k = 0; k < kKeys; ++k) key[k] = copied(key[k] + whole, rest, last[k]);
      add_two(key, 0, whole);
    }
    for (int g = 0; g < tile; ++g) add_sums_of_four<A>(sums[g], room.z[g] + j);
  }
}

// The logits of `count` keys become e^{z - m}.
template <class A>
void weigh(int g, int64_t count, A softcap, Room<A>& room) {
  A* z = room.z[g];
  if (std::isfinite(softcap)) {
    for (int64_t j = 0; j < count; j += kLanes<A>) store(z + j, capped<true>(load(z + j), softcap));
  }
  for (int64_t j = count; j % kLanes<A>; ++j) z[j] = -kInfinity<A>;
  Vec<A> most = splat(-kInfinity<A>);
  for (int64_t j = 0; j < count; j += kLanes<A>) most = larger(load(z + j), most);
  room.m[g] = max_lanes<A>(most);
  const Vec<A> shift = splat(room.m[g] == -kInfinity<A> ? A(0) : room.m[g]);
  const Exp2<A> power(A(kLog2E), 0);
  Vec<A> sum{};
  for (int64_t j = 0; j < count; j += kLanes<A>) {
    const Vec<A> p = power(larger(power.at_least(), Vec<A>(load(z + j) - shift)));
    store(z + j, p);
    sum += p;
  }
  room.sum[g] = A(sum_lanes<A>(sum));
}

// The weighted sums of 2 `pairs` kLanes columns of values, or of one vector of n where that is 0.
template <int tile, int pairs, class K, class A>
void sum_values(const K* values, int64_t stride, int64_t count, int64_t n, const Room<A>& room,
                const K* then, Vec<A> (&sums)[tile][pairs ? 2 * pairs : 1]) {
  constexpr int one = kLanes<A>, vectors = pairs ? 2 * pairs : 1;
  Vec<A> lanes[tile][vectors] = {};
  const K* const end = values + count * stride;
  for (int64_t j = 0; j < count; ++j) {
    const K* value = values + j * stride;
    Vec<A> v[vectors];
    for (int i = 0; i < pairs; ++i) {
      prefetch(value + 2 * i * one, end, then);
      load_two(value + 2 * i * one, v[2 * i], v[2 * i + 1]);
    }
    if (pairs == 0) v[0] = n < one ? load_first(value, n) : load(value);
    for (int g = 0; g < tile; ++g) {
      const Vec<A> p = splat(room.z[g][j]);
      for (int i = 0; i < vectors; ++i) lanes[g][i] = multiply_add(p, v[i], lanes[g][i]);
    }
  }
  std::memcpy(sums, lanes, sizeof(lanes));
}

// 1 / (l + e^{sink - m}), with m the larger one of both; what the sum over a head's values is
// multiplied by in the end. 0 without any key.
template <class A>
A normalizer(const DecodeAttention& args, int64_t head, A m, A sum) {
  if (sum == 0) return 0;
  if (args.sinks == nullptr) return 1 / sum;
  const double sink = static_cast<const A*>(args.sinks)[head], most = sink > m ? sink : double(m);
  const double factor = std::exp(m - most);
  return A(factor / (sum * factor + std::exp(sink - most)));
}

// Numbers of `dtype` one after the other; at `c`, n of a vector or what load_two has read.
struct Output {
  DType dtype;
  void* to;

  template <class A>
  __attribute__((noinline)) void put(int64_t c, int64_t n, Vec<A> x, A factor) const {
    x *= factor;
    with_dtype(dtype, [&](auto zero) {
      using T = decltype(zero);
      T* out = static_cast<T*>(to) + c;
      for (int i = 0; i < n; ++i) narrow(Accumulator<T>(x[i]), out[i]);
    });
  }

  template <class K, class A>
  __attribute__((noinline)) void put_two(int64_t c, Vec<A> a, Vec<A> b, A factor) const {
    constexpr int one = kLanes<A>, step = kStepOfTwo<K>, second = kSecondOfTwo<K>;
    A x[2 * one];
    store(x, a * factor);
    store(x + one, b * factor);
    with_dtype(dtype, [&](auto zero) {
      using T = decltype(zero);
      T* out = static_cast<T*>(to) + c;
      for (int i = 0; i < one; ++i) {
        narrow(Accumulator<T>(x[i]), out[i * step]);
        narrow(Accumulator<T>(x[one + i]), out[i * step + second]);
      }
    });
  }
};

template <class A>
A* part(const DecodeAttention& args, int64_t row, int64_t head, int64_t piece) {
  const int64_t of_head = (row * args.kv_heads * args.group + head) * args.pieces + piece;
  return static_cast<A*>(args.parts) + of_head * (args.value_width + 2);
}

Output output(const DecodeAttention& args, int64_t row, int64_t head) {
  const int64_t bytes = args.query_dtype == DType::f64 ? 8 : args.query_dtype == DType::f32 ? 4 : 2;
  const int64_t place = (row * args.kv_heads * args.group + head) * args.value_width;
  return {args.query_dtype, static_cast<char*>(args.out) + place * bytes};
}

int64_t keys_of(const DecodeAttention& args, int64_t row) {
  return args.lengths[row] < args.window ? args.lengths[row] : args.window;
}

// Where in x, keys or values, those of a piece begin.
template <class K>
const K* start(const DecodeAttention& args, const Heads& x, int64_t row, int64_t kv_head,
               int64_t piece) {
  const int64_t first = args.lengths[row] - keys_of(args, row) + piece * kKeysPerPiece;
  return static_cast<const K*>(x.data) + row * x.row_stride + kv_head * x.head_stride +
         first * x.token_stride;
}

// The last place in x, keys or values, of a row that has one.
template <class K>
K* last_place(const DecodeAttention& args, const Heads& x, int64_t row, int64_t kv_head) {
  return static_cast<K*>(x.data) + row * x.row_stride + kv_head * x.head_stride +
         (args.lengths[row] - 1) * x.token_stride;
}

// Writes `count` numbers of a row, rounded.
template <class K>
void write(const Heads& from, DType dtype, int64_t row, int64_t kv_head, int64_t count, K* to) {
  with_dtype(dtype, [&](auto zero) {
    using N = decltype(zero);
    const N* x = static_cast<const N*>(from.data) + row * from.row_stride +
                 kv_head * from.head_stride;
    if constexpr (kSame<N, K>) {
      std::memcpy(to, x, size_t(count) * sizeof(K));
    } else {
      for (int64_t i = 0; i < count; ++i) narrow(Accumulator<K>(widen(x[i])), to[i]);
    }
  });
}

// One piece of a row's keys, for `tile` heads from `head` on. What is read after it is at `then`.
template <int tile, class K, class A = Accumulator<K>>
void attend(const DecodeAttention& args, int64_t row, int64_t head, int64_t piece, const K* then) {
  constexpr int64_t one = kLanes<A>;
  const int64_t used = keys_of(args, row), left = used - piece * kKeysPerPiece;
  if (left <= 0 && piece > 0) return;
  const int64_t count = left < kKeysPerPiece ? left : kKeysPerPiece, kv_head = head / args.group;
  const K* const keys = start<K>(args, args.keys, row, kv_head, piece);
  const K* const values = start<K>(args, args.values, row, kv_head, piece);

  Room<A> room;
  for (int g = 0; g < tile; ++g) {
    for (int64_t j = 0; j < (count + kKeys - 1) / kKeys * kKeys; ++j) room.z[g][j] = 0;
  }
  for (int64_t c = 0; c < args.width; c += kColumns) {
    const int64_t n = args.width - c < kColumns ? args.width - c : kColumns;
    read_queries<K>(args, row, head, tile, c, n, room);
    add_logits<tile>(keys + c, args.keys.token_stride, count, n, values, room);
  }

  Output outputs[tile];
  A factors[tile];
  for (int g = 0; g < tile; ++g) {
    weigh(g, count, A(args.softcap), room);
    if (used <= kKeysPerPiece) {
      outputs[g] = output(args, row, head + g);
      factors[g] = normalizer(args, head + g, room.m[g], room.sum[g]);
    } else {
      A* kept = part<A>(args, row, head + g, piece);
      kept[0] = room.m[g];
      kept[1] = room.sum[g];
      outputs[g] = {sizeof(A) == 8 ? DType::f64 : DType::f32, kept + 2};
      factors[g] = 1;
    }
  }

  int64_t c = 0;
  const auto whole = [&](auto constant) {
    constexpr int pairs = decltype(constant)::value;
    for (; c + 2 * pairs * one <= args.value_width; c += 2 * pairs * one) {
      Vec<A> sums[tile][2 * pairs];
      sum_values<tile, pairs>(values + c, args.values.token_stride, count, one, room, then, sums);
      for (int g = 0; g < tile; ++g) {
        for (int i = 0; i < pairs; ++i) {
          outputs[g].template put_two<K, A>(c + 2 * i * one, sums[g][2 * i], sums[g][2 * i + 1],
                                            factors[g]);
        }
      }
    }
  };
  if (kPairs > 1) whole(Constant<kPairs>{});
  whole(Constant<1>{});
  for (; c < args.value_width; c += one) {
    const int64_t n = args.value_width - c < one ? args.value_width - c : one;
    Vec<A> sums[tile][1];
    sum_values<tile, 0>(values + c, args.values.token_stride, count, n, room, then, sums);
    for (int g = 0; g < tile; ++g) outputs[g].template put<A>(c, n, sums[g][0], factors[g]);
  }
}

// The pieces of a head, in order.
template <class A>
void merge(const DecodeAttention& args, int64_t row, int64_t head) {
  const int64_t used = keys_of(args, row);
  if (used <= kKeysPerPiece) return;
  const int64_t pieces = (used + kKeysPerPiece - 1) / kKeysPerPiece;
  A m = -kInfinity<A>;
  for (int64_t i = 0; i < pieces; ++i) {
    const A of_piece = *part<A>(args, row, head, i);
    m = of_piece > m ? of_piece : m;
  }
  A* sums = part<A>(args, row, head, 0);
  for (int64_t i = 0; i < pieces; ++i) {
    const A* x = part<A>(args, row, head, i);
    const A factor = x[0] == -kInfinity<A> ? A(0) : A(std::exp(double(x[0]) - m));
    for (int64_t c = 1; c < args.value_width + 2; ++c) {
      sums[c] = (i ? sums[c] : A(0)) + factor * x[c];
    }
  }
  const Output out = output(args, row, head);
  const A factor = normalizer(args, head, m, sums[1]);
  for (int64_t c = 0; c < args.value_width; c += kLanes<A>) {
    const int64_t n = args.value_width - c < kLanes<A> ? args.value_width - c : kLanes<A>;
    out.put<A>(c, n, load_first(sums + 2 + c, n), factor);
  }
}

template <int tile, class K>
void attend_group(const DecodeAttention& args, int64_t row, int64_t head, int64_t end,
                  int64_t piece, const K* then) {
  for (; head + tile <= end; head += tile) attend<tile, K>(args, row, head, piece, then);
  if constexpr (tile > 1) attend_group<tile - 1, K>(args, row, head, end, piece, then);
}

}  // namespace

void decode_attention(const DecodeAttention& args) {
  with_dtype(args.dtype, [&](auto zero) {
    using K = decltype(zero);
    const int64_t heads = args.kv_heads * args.group;
    const int64_t tasks = args.rows * args.kv_heads * args.pieces;
    parallel_for(tasks, args.threads, [&](int64_t i) {
      const int64_t piece = i % args.pieces, kv_head = i / args.pieces % args.kv_heads;
      const int64_t row = i / args.pieces / args.kv_heads, first = kv_head * args.group;
      // The threads take turns, more or less.
      const int64_t next = i + args.threads < tasks ? i + args.threads : i;
      const K* then = start<K>(args, args.keys, next / args.pieces / args.kv_heads,
                               next / args.pieces % args.kv_heads, next % args.pieces);
      // Of the tasks of a row and head, the one with the last place writes and reads it.
      if (args.new_keys.data != nullptr && args.lengths[row] > 0 &&
          piece == (keys_of(args, row) - 1) / kKeysPerPiece) {
        write(args.new_keys, args.new_keys_dtype, row, kv_head, args.width,
              last_place<K>(args, args.keys, row, kv_head));
        write(args.new_values, args.new_values_dtype, row, kv_head, args.value_width,
              last_place<K>(args, args.values, row, kv_head));
      }
      attend_group<kTile, K>(args, row, first, first + args.group, piece, then);
    });
    if (args.pieces == 1) return;
    parallel_for(args.rows * heads, args.threads, [&](int64_t i) {
      merge<Accumulator<K>>(args, i / heads, i % heads);
    });
  });
}

}  // namespace ppo::PPO_ISA
