// What crosses between the bindings and the kernels: plain data, no code.
//
// The kernels are compiled once per instruction set, so an inline function here would be merged by
// the linker and might run AVX-512 code on a machine without it. Code that kernels share is in
// tokens.h and simd.h, inside an anonymous namespace.
#pragma once

#include <cstdint>

namespace ppo {

enum class DType : int { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };

// B sequences of tokens: padded [B, T] where `cu_seqlens` is null and `length` is T, or packed [N]
// where sequence b is tokens cu_seqlens[b] to cu_seqlens[b + 1] and `length` is N.
struct Rows {
  int64_t count;
  int64_t length;
  const int64_t* cu_seqlens;
};

// One tensor over those rows, strides in elements. Packed: row_stride 0. One number per sequence,
// [B]: stride 0. An absent tensor: data null.
struct Tokens {
  void* data;
  int64_t row_stride;
  int64_t stride;
};

// Count, mean and sum of squared deviations from the mean, of some numbers.
struct Moments {
  double count, mean, m2;
};

enum class KL : int { none = 0, k1 = 1, k2 = 2, k3 = 3 };

// What one thread does of gae at a time: rows of about kTokensPerPiece tokens together, or a chunk of
// that many tokens of a longer row. Pieces depend on the shape alone, so that no result depends on
// the number of threads.
constexpr int64_t kTokensPerPiece = 8192;

struct GaePiece {
  int64_t row, rows;  // rows [row, row + rows), whole,
  bool is_chunk;      // or of one row
  int64_t begin, end;  // tokens [begin, end),
  int64_t right;       // whose carry comes from this earlier piece, or -1
  Moments moments;    // of the advantages; scratch, as what follows
  double carry, kl;   // what the chunk passes to the next one
  bool handed_on;
};

// gae (kl_estimator none, rewards given) and kl_shaped_gae (rewards made of the other tensors).
// Outputs are in the accumulation dtype: float64 where dtype is f64, else float32.
struct GaeArgs {
  DType dtype;  // of every input
  Rows rows;
  Tokens mask;  // bool
  Tokens values, bootstrap;
  Tokens rewards;
  Tokens scores, logprobs, ref_logprobs;
  KL kl_estimator;
  double kl_coef, gamma, lam;
  Tokens advantages, returns;  // out
  Tokens kl;                   // out, one per sequence, or absent
  Moments* moments;            // out
  GaePiece* pieces;
  int64_t piece_count;
  int threads;
};

// N rows of logits, last dimension contiguous; the leading dimensions may have any strides.
struct LogitRows {
  void* data;
  DType dtype;
  int64_t vocab;
  int dims;                // leading dimensions
  const int64_t* shape;    // [dims]
  const int64_t* strides;  // [dims], in elements
};

// What the backward pass needs of each row beside its log-prob: two arrays [N], one after the
// other, in the accumulation dtype.
//   M         a number near the largest logit apart from the target's
//   log_norm  log p_j = (z_j - M) / temperature - log_norm

// Of a row's classes seen so far but the target: M, sum e^{(z_j - M) / temperature}, the same times
// z_j - M; and the target's logit.
struct RowSums {
  double shift, sum, dot, target;
};

struct LogprobForward {
  LogitRows logits;
  int64_t count;           // N
  const int64_t* targets;  // [N]
  double temperature;
  double softcap;  // infinite: none
  int64_t first_class, classes;  // the logits are those of classes from first_class on, of so many
  RowSums* sums;   // scratch, [N], from one part of the classes to the next; null: all are here
  void* logprobs;  // out, [N], accumulation dtype
  void* entropy;   // out, [N], or null
  void* state;     // out, [2, N], or null
  int threads;
};

struct LogprobBackward {
  LogitRows logits;
  int64_t count;
  const int64_t* targets;
  double temperature;
  double softcap;
  const void* grad_logprobs;  // [N] or null
  const void* grad_entropy;   // [N] or null
  const void* logprobs;
  const void* entropy;  // or null, as grad_entropy then is
  const void* state;
  void* grad_logits;  // out, [N, V] contiguous, dtype of the logits
  int threads;
};

// The length of a list of numbers of a row beyond the row's: for whole vectors at its end.
constexpr int64_t kListRoom = 64;

struct SampleArgs {
  LogitRows logits;
  int64_t count;  // N
  double temperature;
  int64_t top_k;  // 0: all
  double top_p;   // 1: all
  uint64_t seed;
  const int64_t* offsets;  // [N] counters; or null, and row i has `offset` + i
  int64_t offset;
  int64_t* tokens;  // out, [N]
  void* logprobs;   // out, [N], accumulation dtype
  int64_t tasks;    // that the rows are shared out to
  void* lists;      // scratch: two of each task, accumulation dtype; null without top-k and top-p
  int threads;
};

enum class Reduction : int { token_mean = 0, sequence_mean = 1, sum = 2 };
enum class Objective : int { clip = 0, cispo = 1 };
enum class RatioLevel : int { token = 0, sequence = 1 };

// What the token losses share. They take the tokens in blocks of kTokensPerBlock, in order.
constexpr int64_t kTokensPerBlock = 8192;

struct LossTokens {
  DType dtype;  // of every input
  Rows rows;    // the sequences, where they matter; else any that hold the tokens
  Tokens mask;  // bool
  Reduction reduction;
  double normalizer;     // replaces the denominator; negative: none given
  double* row_weights;   // scratch, [rows.count] for sequence_mean, else null
  int threads;
};

// Sums over the real tokens of a block.
struct PolicySums {
  double count, loss, log_ratio_sq, clipped, ratio, ratio_max, kl, entropy;
};

struct PolicyLossArgs {
  LossTokens tokens;
  Tokens logprobs, old_logprobs, advantages;
  Tokens entropy, ref_logprobs, is_weights;  // or absent
  double advantage_mean, advantage_scale;    // A becomes (A - mean) * scale
  double clip_low, clip_high;
  double dual_clip;  // infinite: none
  double entropy_coef, kl_coef;
  KL kl_estimator;
  Objective objective;
  RatioLevel ratio_level;
  double* log_ratios;                  // scratch, one per sequence where the ratios are theirs
  PolicySums* sums;                    // scratch, one per block
  Tokens grad_logprobs, grad_entropy;  // out, accumulation dtype, or absent
  double* results;                     // out: loss, then the fields of PolicyStats
};

struct ValueSums {
  double count, loss, clipped, value, error_sq;
  Moments returns;
};

struct ValueLossArgs {
  LossTokens tokens;
  Tokens values, old_values, returns;
  double clip_range;   // infinite: none
  ValueSums* sums;     // scratch, one per block
  Tokens grad_values;  // out, accumulation dtype, or absent
  double* results;     // out: loss, then the fields of ValueStats
};

struct PairwiseSums {
  double loss, wins, difference;
};

struct PairwiseLossArgs {
  DType dtype;
  int64_t count;
  Tokens chosen, rejected;
  Tokens margins;  // or absent
  double margin;   // where they are absent
  double center_coef;
  PairwiseSums* sums;                   // scratch, one per block
  Tokens grad_chosen, grad_rejected;    // out, accumulation dtype, or absent
  double* results;                      // out: loss, accuracy, margin
  int threads;
};

struct RankingSums {
  double loss;    // of the prompts' means
  double ranked;  // prompts that have a pair
  double pairs, wins, difference;
};

struct RankingLossArgs {
  DType dtype;
  int64_t prompts, responses;
  Tokens scores;
  Tokens ranks;  // int64 or int32
  bool ranks_are_int64;
  int64_t prompts_per_block;
  RankingSums* sums;   // scratch, one per block
  Tokens grad_scores;  // out, accumulation dtype, or absent
  double* results;     // out: loss, accuracy, margin
  int threads;
};

// Keys that are attended to at a time. What is merged depends on the row's length alone, so that no
// result depends on the number of threads, nor on the other rows.
constexpr int64_t kKeysPerPiece = 256;

// Numbers of a row, a head and a token, side by side; strides in elements.
struct Heads {
  void* data;
  int64_t row_stride, head_stride;
  int64_t token_stride;  // 0 of a query of one token
};

// With an accumulation dtype A: float64 where the keys are, else float32.
struct DecodeAttention {
  DType query_dtype;  // of the output too
  DType dtype;        // of keys and values
  int64_t rows, kv_heads, group;  // query heads of each of the kv_heads
  int64_t width, value_width;
  Heads query, keys, values;
  const int64_t* lengths;  // [rows]
  double scale;
  double softcap;     // infinite: none
  int64_t window;     // keys that count, at most
  Heads new_keys, new_values;  // of each row's last place, written there first; or no data
  DType new_keys_dtype, new_values_dtype;
  const void* sinks;  // [heads], A, or null
  void* out;          // [rows, heads, value_width]
  int64_t pieces;     // of the longest row
  void* parts;        // scratch, [rows, heads, pieces, value_width + 2], A, or null with one piece
  int threads;
};

// Elements of one tensor of adamw, in one piece of memory each.
struct AdamWTensor {
  void* weights;
  uint16_t* remainder;  // of bf16 weights, the bits of an int16; else null
  const void* grads;
  void *exp_avg, *exp_avg_sq;  // float, or with scales int8_t and uint8_t
  float* scales;               // [2, blocks of kMomentBlock elements], or null
  int64_t count;
};

constexpr int64_t kMomentBlock = 256;  // elements that have one scale

// What one thread does of adamw at a time: whole blocks.
constexpr int64_t kElementsPerPiece = 16384;
static_assert(kElementsPerPiece % kMomentBlock == 0);

struct AdamWPiece {
  int64_t tensor, first, last;  // elements [first, last)
};

struct AdamWArgs {
  DType weights, grads;  // bf16 or f32; any but f64
  bool eight_bits;       // of the moments
  const AdamWTensor* tensors;
  const AdamWPiece* pieces;
  int64_t piece_count;
  float decay;  // what weights are multiplied by
  float size;   // minus the step's
  float root;   // of the second moments' bias correction
  float mix;    // the new mean is mix (g - mean) + mean,
  bool near_mean;  // or mix (g - mean) + g
  float beta2, rest;  // and 1 - beta2
  float eps, grad_scale;
  int threads;
};

// Rows whose part of the weight's gradient is summed at a time, so that no result depends on the
// number of threads.
constexpr int64_t kNormRows = 16;

// x, y and its gradient are all float64, or none is; that decides the accumulation dtype A.
struct RmsNorm {
  LogitRows x;          // rows of numbers as they are of logits
  int64_t count;        // N
  const void* weight;   // [D]
  DType weight_dtype;
  double eps, added;
  void* y;              // out, [N, D], of a forward pass
  DType y_dtype;
  LogitRows grad_y;     // of a backward pass, as what follows
  void* grad_x;         // out, [N, D], dtype of x, or null
  void* grad_weight;    // out, [D], dtype of the weight, or null
  void* scratch;        // [D], A; for grad_weight, [1 + parts, D]
  int threads;
};

// Heads to be rotated, `count` for each token, and where they go: [rows, tokens, count, width].
struct RotatedHeads {
  Heads from;
  int64_t count;
  void* to;
};

// Computed in float64 where dtype is f64 (angles_dtype then is any), else in float32.
struct RotaryEmbedding {
  DType dtype;         // of query, key and results
  DType angles_dtype;  // of cosines and sines
  int64_t rows, tokens, width;
  int64_t rotated;     // numbers of a head; even
  bool transposed;
  Tokens cos, sin;     // `rotated` numbers of each token
  RotatedHeads query, key;
  int threads;
};

// Gate, up and the gradient of y have one shape and dtype; y and the gradients are contiguous.
struct SwiGLU {
  LogitRows gate, up;         // rows of numbers as they are of logits; if contiguous, one row
  int64_t count;              // of rows
  void* y;                    // out, of a forward pass
  LogitRows grad_y;           // of a backward pass, as what follows
  void *grad_gate, *grad_up;  // out; one of them may be null
  int threads;
};

// Outputs of packed_linear whose weights lie together: a panel. Of the input `in`, a panel has
// [in][kPanel] float32, or [ceil(in / 2)][kPanel][2] bfloat16, the last of an odd `in` with 0.
constexpr int64_t kPanel = 16;

// Some of the outputs' weights, into their place among the panels.
struct PackWeight {
  DType from_dtype, dtype;  // f32 or bf16 in the panels
  const void* from;         // [count, in]
  int64_t count, in;
  int64_t out_stride, in_stride;  // of `from`
  int64_t first, last;  // the first of these outputs, and that of all; where these end there, what
                        // the last panel has beyond is set to 0
  void* panels;
  int threads;
};

struct PackedLinear {
  DType x_dtype, dtype, out_dtype;  // of the input, the panels, the output
  int64_t rows, in, outs;
  const void* x;      // [rows, in]
  int64_t row_stride;
  const void* panels;
  const float* bias;  // [outs], or null
  void* out;          // [rows, outs]
  void* tiles;        // scratch, [rows, in, an odd one of bfloat16 plus 1] in the panels' dtype
  int threads;
};

// The entry points of one instruction set: kernels.cpp fills one in for each.
struct Kernels {
  void (*gae)(const GaeArgs&);
  void (*token_logprobs)(const LogprobForward&);
  void (*token_logprobs_backward)(const LogprobBackward&);
  void (*ppo_policy_loss)(const PolicyLossArgs&);
  void (*ppo_value_loss)(const ValueLossArgs&);
  void (*pairwise_loss)(const PairwiseLossArgs&);
  void (*ranking_loss)(const RankingLossArgs&);
  void (*sample)(const SampleArgs&);
  void (*decode_attention)(const DecodeAttention&);
  void (*adamw)(const AdamWArgs&);
  void (*rms_norm)(const RmsNorm&);
  void (*rms_norm_backward)(const RmsNorm&);
  void (*rotary_embedding)(const RotaryEmbedding&);
  void (*swiglu)(const SwiGLU&);
  void (*swiglu_backward)(const SwiGLU&);
  void (*pack_weight)(const PackWeight&);
  void (*packed_linear)(const PackedLinear&);
};

}  // namespace ppo
