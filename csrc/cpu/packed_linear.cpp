// Products of a few rows with weights that lie in the order in which they are read.
//
//   y = x W^T + b
//
// The weights of kPanel outputs lie together, input by input (ops.h), so that a tile, some rows of x
// by one panel, is a sum in registers: a vector of weights, loaded once, times a number of each row.
// A task is some panels that fit the cache, by all rows: from memory every weight is read once.
#include <algorithm>
#include <vector>

#include "simd.h"
#include "threads.h"

namespace ppo::PPO_ISA {
namespace {

constexpr int kVectors = int(kPanel) / kLanes<float>;  // of a panel
#if defined(__AVX512F__)
constexpr int kRows = 16;  // of a tile: its sums fit the registers
#elif defined(__AVX2__)
constexpr int kRows = 6;
#else
constexpr int kRows = 3;
#endif
constexpr int64_t kTaskBytes = 256 * 1024;  // of weights
constexpr int64_t kAhead = 4096;            // bytes that are prefetched before they are used
constexpr int64_t kWorthWaking = 65536;     // numbers of x

template <int n> struct Constant { static constexpr int value = n; };

template <int rows> struct Tile { Vec<float> sums[rows][kVectors]; };

inline void prefetch(const void* p) { __builtin_prefetch(static_cast<const char*>(p) + kAhead); }

template <int rows>
inline void multiply(const float* x, int64_t stride, const float* panel, int64_t in,
                     Tile<rows>& tile) {
  for (int64_t k = 0; k < in; ++k, panel += kPanel) {
    Vec<float> w[kVectors];
    prefetch(panel);
    for (int v = 0; v < kVectors; ++v) w[v] = load(panel + v * kLanes<float>);
    for (int r = 0; r < rows; ++r) {
      const Vec<float> number = splat<float>(x[r * stride + k]);
      for (int v = 0; v < kVectors; ++v) {
        tile.sums[r][v] = multiply_add(number, w[v], tile.sums[r][v]);
      }
    }
  }
}

#if defined(__AVX512F__)
// Two inputs at a time: the instruction's pairs of products are summed in float32.
template <int rows>
__attribute__((target("avx512bf16"))) inline void multiply(const bf16* x, int64_t stride,
                                                           const bf16* panel, int64_t in,
                                                           Tile<rows>& tile) {
  for (int64_t k = 0; k < in; k += 2, panel += 2 * kPanel) {
    prefetch(panel);
    const __m512bh w = load_bits<__m512bh>(panel);
    for (int r = 0; r < rows; ++r) {
      const __m512bh pair = (__m512bh)_mm512_set1_epi32(load_bits<int>(x + r * stride + k));
      tile.sums[r][0] = (Vec<float>)_mm512_dpbf16_ps((__m512)tile.sums[r][0], w, pair);
    }
  }
}
#endif

template <class W, int rows>
void one_tile(const PackedLinear& args, const W* x, int64_t stride, int64_t row, int64_t panel) {
  const int64_t padded = sizeof(W) == 2 ? (args.in + 1) / 2 * 2 : args.in;
  Tile<rows> tile{};
  multiply<rows>(x + row * stride, stride, static_cast<const W*>(args.panels) + panel * kPanel * padded,
                 padded, tile);
  const int64_t first = panel * kPanel;
  for (int v = 0; v < kVectors; ++v) {
    const int64_t at = first + v * kLanes<float>, left = args.outs - at;
    if (left <= 0) return;
    const bool whole = left >= kLanes<float>;
    Vec<float> bias{};
    if (args.bias) bias = whole ? load(args.bias + at) : load_first(args.bias + at, left);
    with_dtype(args.out_dtype, [&](auto zero) {
      using Out = decltype(zero);
      if constexpr (sizeof(Out) < 8) {
        for (int r = 0; r < rows; ++r) {
          Out* to = static_cast<Out*>(args.out) + (row + r) * args.outs + at;
          const Vec<float> sum = tile.sums[r][v] + bias;
          whole ? store(to, sum) : store_first(to, left, sum);
        }
      }
    });
  }
}

// The last rows, fewer than a tile has.
template <class W, int rows = kRows - 1>
void last_tile(const PackedLinear& args, const W* x, int64_t stride, int64_t row, int64_t panel) {
  if constexpr (rows > 0) {
    if (args.rows - row == rows) return one_tile<W, rows>(args, x, stride, row, panel);
    last_tile<W, rows - 1>(args, x, stride, row, panel);
  }
}

template <class W>
void multiply_all(const PackedLinear& args, const W* x, int64_t stride) {
  const int64_t panels = (args.outs + kPanel - 1) / kPanel;
  const int64_t bytes = kPanel * args.in * int64_t(sizeof(W));
  const int64_t most = std::max<int64_t>(kTaskBytes / std::max<int64_t>(bytes, 1), 1);
  const int64_t threads = args.threads;
  // As many tasks for each thread, as even as panels can be shared.
  const int64_t tasks = std::min(panels, (panels + most * threads - 1) / (most * threads) * threads);
  parallel_for(tasks, args.threads, [&](int64_t task) {
    const int64_t begin = task * panels / tasks, end = (task + 1) * panels / tasks;
    for (int64_t row = 0; row < args.rows; row += kRows) {
      for (int64_t panel = begin; panel < end; ++panel) {
        if (row + kRows <= args.rows) {
          one_tile<W, kRows>(args, x, stride, row, panel);
        } else {
          last_tile<W>(args, x, stride, row, panel);
        }
      }
    }
  });
}

// x in the dtype of the panels, the numbers of a row side by side and, of bfloat16, even in number.
template <class W, class X>
void in_dtype_of_panels(const PackedLinear& args, const X* x) {
  const int64_t width = sizeof(W) == 2 ? (args.in + 1) / 2 * 2 : args.in;
  std::vector<W> room(size_t(args.rows * width));
  const bool small = args.rows * width < kWorthWaking;
  const int64_t threads = small ? 1 : std::min<int64_t>(args.threads, args.rows);
  parallel_for(threads, int(threads), [&](int64_t task) {
    const int64_t begin = task * args.rows / threads, end = (task + 1) * args.rows / threads;
    for (int64_t r = begin; r < end; ++r) {
      const X* from = x + r * args.row_stride;
      W* to = room.data() + r * width;
      int64_t k = 0;
      if constexpr (sizeof(X) < 8) {
        for (; k + kLanes<float> <= args.in; k += kLanes<float>) store(to + k, load(from + k));
      }
      for (; k < args.in; ++k) narrow(float(widen(from[k])), to[k]);
    }
  });
  multiply_all<W>(args, room.data(), width);
}

template <class W>
void multiply_with(const PackedLinear& args) {
  with_dtype(args.x_dtype, [&](auto zero) {
    using X = decltype(zero);
    const X* x = static_cast<const X*>(args.x);
    if constexpr (sizeof(X) == sizeof(W)) {
      const bool same = args.x_dtype == args.dtype && (sizeof(W) == 4 || args.in % 2 == 0);
      if (same) return multiply_all<W>(args, static_cast<const W*>(args.x), args.row_stride);
    }
    in_dtype_of_panels<W>(args, x);
  });
}

template <class W, class From>
void pack(const PackWeight& args) {
  const int64_t padded = sizeof(W) == 2 ? (args.in + 1) / 2 * 2 : args.in;
  constexpr int64_t at_once = sizeof(W) == 2 ? 2 : 1;  // inputs that lie together
  const int64_t begin = args.first / kPanel, end = (args.first + args.count + kPanel - 1) / kPanel;
  const int64_t tasks = end - begin;
  parallel_for(tasks, args.threads, [&](int64_t task) {
    const int64_t panel = begin + task;
    W* to = static_cast<W*>(args.panels) + panel * kPanel * padded;
    const int64_t low = std::max<int64_t>(args.first - panel * kPanel, 0);
    const int64_t high = std::min(args.first + args.count - panel * kPanel, kPanel);
    const From* from = static_cast<const From*>(args.from) +
                       (panel * kPanel + low - args.first) * args.out_stride;
    const bool ends = panel * kPanel + high == args.last;
    for (int64_t lane = low; lane < (ends ? kPanel : high); ++lane, from += args.out_stride) {
      for (int64_t k = 0; k < padded; ++k) {
        W& place = to[k / at_once * (kPanel * at_once) + lane * at_once + k % at_once];
        if (lane < high && k < args.in) {
          narrow(float(widen(from[k * args.in_stride])), place);
        } else {
          place = W{};
        }
      }
    }
  });
}

}  // namespace

void pack_weight(const PackWeight& args) {
  with_dtype(args.from_dtype, [&](auto zero) {
    using From = decltype(zero);
    args.dtype == DType::bf16 ? pack<bf16, From>(args) : pack<float, From>(args);
  });
}

void packed_linear(const PackedLinear& args) {
#if defined(__AVX512F__)
  if (args.dtype == DType::bf16) return multiply_with<bf16>(args);
#endif
  multiply_with<float>(args);
}

}  // namespace ppo::PPO_ISA
