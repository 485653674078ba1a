// Products of a few rows with weights that lie in the order in which they are read.
//
//   y = x W^T + b
//
// The weights of kPanel outputs lie together, input by input (ops.h), so that a tile, some rows of
// x by one panel, is a sum in registers: a vector of weights, loaded once, times a number of each
// row. A task is some panels that fit the cache, by all rows: a weight is read from memory once.
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
constexpr int64_t kInputs = 64;             // that are put in order at a time
constexpr int64_t kTaskBytes = 256 * 1024;  // of weights
constexpr int64_t kAhead = 4096;            // bytes that are prefetched before they are used
constexpr int64_t kWorthWaking = 65536;     // numbers of x

// Inputs of an output that lie together in a panel, and how many a panel has for `in`.
template <class W> constexpr int64_t kTogether = sizeof(W) == 2 ? 2 : 1;
template <class W>
constexpr int64_t padded(int64_t in) {
  return (in + kTogether<W> - 1) / kTogether<W> * kTogether<W>;
}

template <int rows> struct Tile { Vec<float> sums[rows][kVectors]; };

inline void prefetch(const void* p) { __builtin_prefetch(static_cast<const char*>(p) + kAhead); }

template <int rows>
inline void multiply(const float* x, const float* panel, int64_t in, Tile<rows>& tile) {
  for (int64_t k = 0; k < in; ++k, panel += kPanel, x += rows) {
    Vec<float> w[kVectors];
    prefetch(panel);
    for (int v = 0; v < kVectors; ++v) w[v] = load(panel + v * kLanes<float>);
    for (int r = 0; r < rows; ++r) {
      const Vec<float> number = splat<float>(x[r]);
      for (int v = 0; v < kVectors; ++v) {
        tile.sums[r][v] = multiply_add(number, w[v], tile.sums[r][v]);
      }
    }
  }
}

#if defined(__AVX512F__)
// Two inputs at a time: the instruction's pairs of products are summed in float32. (Of another
// target than its caller, it is not inlined: in `tile`, the sums would be stored at each step.)
template <int rows>
__attribute__((target("avx512bf16"))) inline void multiply(const bf16* x, const bf16* panel,
                                                           int64_t in, Tile<rows>& tile) {
  __m512 sums[rows] = {};
  for (int64_t k = 0; k < in; k += 2, panel += 2 * kPanel, x += 2 * rows) {
    prefetch(panel);
    const __m512bh w = load_bits<__m512bh>(panel);
    for (int r = 0; r < rows; ++r) {
      const __m512bh pair = (__m512bh)_mm512_set1_epi32(load_bits<int>(x + 2 * r));
      sums[r] = _mm512_dpbf16_ps(sums[r], w, pair);
    }
  }
  for (int r = 0; r < rows; ++r) tile.sums[r][0] = (Vec<float>)sums[r];
}
#endif

template <class W, int rows>
void one_tile(const PackedLinear& args, int64_t row, int64_t panel) {
  const int64_t width = padded<W>(args.in), first = panel * kPanel;
  Tile<rows> tile{};
  multiply<rows>(static_cast<const W*>(args.tiles) + row * width,
                 static_cast<const W*>(args.panels) + first * width, width, tile);
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
void last_tile(const PackedLinear& args, int64_t row, int64_t panel) {
  if constexpr (rows > 0) {
    if (args.rows - row == rows) return one_tile<W, rows>(args, row, panel);
    last_tile<W, rows - 1>(args, row, panel);
  }
}

template <class W>
void multiply_all(const PackedLinear& args) {
  const int64_t panels = (args.outs + kPanel - 1) / kPanel;
  const int64_t bytes = kPanel * padded<W>(args.in) * int64_t(sizeof(W));
  const int64_t most = larger<int64_t>(kTaskBytes / larger<int64_t>(bytes, 1), 1);
  // As many tasks for each thread, as even as panels can be shared.
  const int64_t threads = args.threads, round = most * threads;
  const int64_t tasks = smaller(panels, (panels + round - 1) / round * threads);
  parallel_for(tasks, args.threads, [&](int64_t task) {
    const int64_t begin = task * panels / tasks, end = (task + 1) * panels / tasks;
    for (int64_t row = 0; row < args.rows; row += kRows) {
      for (int64_t panel = begin; panel < end; ++panel) {
        if (row + kRows <= args.rows) {
          one_tile<W, kRows>(args, row, panel);
        } else {
          last_tile<W>(args, row, panel);
        }
      }
    }
  });
}

// Numbers side by side, rounded to W.
template <class W, class X>
void round_to(const X* from, int64_t count, W* to) {
  int64_t k = 0;
  if constexpr (sizeof(X) < 8) {
    for (; k + kLanes<float> <= count; k += kLanes<float>) store(to + k, load(from + k));
  }
  for (; k < count; ++k) narrow(float(widen(from[k])), to[k]);
}

// Some inputs of `lanes` rows, or outputs, from a block of one after the other to all of an input.
template <class W>
inline void interleave(const W (*block)[kInputs], int64_t begin, int64_t end, int64_t count,
                       int64_t lanes, W* to) {
  for (int64_t k = 0; k < count; k += kTogether<W>) {
    for (int64_t lane = begin; lane < end; ++lane) {
      W* place = to + k * lanes + lane * kTogether<W>;
      std::memcpy(place, block[lane] + k, sizeof(W) * kTogether<W>);
    }
  }
}

// x as tiles read it: in the dtype of the panels, the numbers of a tile's rows side by side. (With
// each row in a place of its own, a tile needs more addresses than there are registers.)
template <class W, class X>
void put_in_tiles(const PackedLinear& args, const X* x) {
  const int64_t width = padded<W>(args.in), blocks = (width + kInputs - 1) / kInputs;
  const int threads = args.rows * width < kWorthWaking ? 1 : args.threads;
  parallel_for((args.rows + kRows - 1) / kRows * blocks, threads, [&](int64_t task) {
    const int64_t row = task / blocks * kRows, k = task % blocks * kInputs;
    const int64_t rows = smaller(args.rows - row, kRows);
    const int64_t real = smaller(kInputs, args.in - k), count = smaller(kInputs, width - k);
    alignas(64) W block[kRows][kInputs];
    for (int64_t r = 0; r < rows; ++r) {
      round_to(x + (row + r) * args.row_stride + k, real, block[r]);
      if (real < count) block[r][real] = W{};
    }
    W* to = static_cast<W*>(args.tiles) + row * width + k * rows;
    rows == kRows ? interleave(block, 0, kRows, count, kRows, to)
                  : interleave(block, 0, rows, count, rows, to);
  });
}

template <class W>
void multiply_with(const PackedLinear& args) {
  with_dtype(args.x_dtype, [&](auto zero) {
    put_in_tiles<W>(args, static_cast<const decltype(zero)*>(args.x));
  });
  multiply_all<W>(args);
}

// Some inputs of a panel at a time go through a block in L1, so that memory is read along the rows
// of the weight, and written along the panel.
template <class W, class From>
void pack(const PackWeight& args) {
  const int64_t width = padded<W>(args.in);
  const int64_t begin = args.first / kPanel, end = (args.first + args.count + kPanel - 1) / kPanel;
  parallel_for(end - begin, args.threads, [&](int64_t task) {
    const int64_t first = (begin + task) * kPanel;  // output of the panel
    const int64_t low = larger<int64_t>(args.first - first, 0);
    const int64_t high = smaller(args.first + args.count - first, kPanel);
    const int64_t last = first + high == args.last ? kPanel : high;
    const From* from = static_cast<const From*>(args.from) +
                       (first + low - args.first) * args.out_stride;
    W* to = static_cast<W*>(args.panels) + first * width;
    alignas(64) W block[kPanel][kInputs] = {};
    for (int64_t k = 0; k < width; k += kInputs) {
      const int64_t real = smaller(kInputs, args.in - k), count = smaller(kInputs, width - k);
      for (int64_t lane = low; lane < high; ++lane) {
        const From* row = from + (lane - low) * args.out_stride + k * args.in_stride;
        if (args.in_stride == 1) {
          round_to(row, real, block[lane]);
        } else {
          for (int64_t i = 0; i < real; ++i) round_to(row + i * args.in_stride, 1, block[lane] + i);
        }
        if (real < count) block[lane][real] = W{};
      }
      W* place = to + k * kPanel;
      low == 0 && last == kPanel ? interleave(block, 0, kPanel, count, kPanel, place)
                                 : interleave(block, low, last, count, kPanel, place);
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
