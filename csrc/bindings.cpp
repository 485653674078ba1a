// The Python interface of the CPU kernels, torch-free: tensors come as views (tensor.h).
// ppo_kernels/<op>.py has checked them, and holds them until the call returns; values that memory
// safety depends on (cu_seqlens, targets) are checked here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/isa.h"
#include "cpu/ops.h"
#include "tensor.h"

namespace py = pybind11;

namespace ppo {
namespace {

// Tokens without boundaries, [N] alone, are one row.
Rows rows(const Tensor& like, const Tensor& cu_seqlens) {
  if (!cu_seqlens) {
    return like.dims() == 2 ? Rows{like.size(0), like.size(1), nullptr}
                            : Rows{1, like.size(0), nullptr};
  }
  const Rows rows{cu_seqlens.size(0) - 1, like.size(0), cu_seqlens.data<const int64_t>()};
  const int64_t* cu = rows.cu_seqlens;
  bool valid = rows.count >= 0 && cu[0] == 0 && cu[rows.count] == rows.length;
  for (int64_t b = 0; valid && b < rows.count; ++b) valid = cu[b] <= cu[b + 1];
  if (!valid) {
    throw std::invalid_argument("cu_seqlens must start with 0, never fall and end with the number "
                                "of tokens, " + std::to_string(rows.length));
  }
  return rows;
}

// The one dtype of all inputs; the kernels would read past the end of a narrower one.
DType common_dtype(std::initializer_list<const Tensor*> inputs) {
  const DType dtype = (*inputs.begin())->dtype();
  for (const Tensor* x : inputs) {
    if (*x && x->dtype() != dtype) throw std::invalid_argument("inputs of several dtypes");
  }
  return dtype;
}

int64_t token_count(const Rows& rows) {
  return rows.cu_seqlens ? rows.length : rows.count * rows.length;
}

// Waking a thread takes as long as this many elements of simple work.
int threads_for(int64_t elements, int threads) {
  constexpr int64_t worth_waking = 16384;
  return elements < worth_waking ? 1 : threads;
}

std::vector<GaePiece> gae_pieces(const Rows& rows) {
  std::vector<GaePiece> pieces, long_rows;
  int64_t tokens = kTokensPerPiece;  // of the last piece: full, so that the next row begins another
  for (int64_t b = 0; b < rows.count; ++b) {
    const int64_t length =
        rows.cu_seqlens ? rows.cu_seqlens[b + 1] - rows.cu_seqlens[b] : rows.length;
    GaePiece piece{};
    piece.row = b;
    piece.rows = 1;
    if (length > kTokensPerPiece) {
      piece.is_chunk = true;
      piece.end = length;
      piece.right = -1;
      long_rows.push_back(piece);
      tokens = kTokensPerPiece;
    } else if (tokens + length > kTokensPerPiece || pieces.empty()) {
      pieces.push_back(piece);
      tokens = length;
    } else {
      pieces.back().rows += 1;
      tokens += length;
    }
  }
  // A chunk of each long row in turn: the carry that the next one needs is then often there.
  while (!long_rows.empty()) {
    size_t unfinished = 0;
    for (GaePiece& rest : long_rows) {
      rest.begin = (rest.end - 1) / kTokensPerPiece * kTokensPerPiece;
      pieces.push_back(rest);
      rest.right = int64_t(pieces.size()) - 1;
      rest.end = rest.begin;
      if (rest.end > 0) long_rows[unfinished++] = rest;
    }
    long_rows.resize(unfinished);
  }
  return pieces;
}

// `numbers` to a small contiguous output in the accumulation dtype.
void store_numbers(const double* numbers, int64_t count, DType dtype, const Tensor& to) {
  for (int64_t i = 0; i < count; ++i) {
    if (dtype == DType::f64) {
      to.data<double>()[i] = numbers[i];
    } else {
      to.data<float>()[i] = float(numbers[i]);
    }
  }
}

void gae(const Tensor& mask, const Tensor& cu_seqlens, const Tensor& values,
         const Tensor& bootstrap, const Tensor& rewards, const Tensor& scores,
         const Tensor& logprobs, const Tensor& ref_logprobs, int kl_estimator, double kl_coef,
         double gamma, double lam, const Tensor& advantages, const Tensor& returns,
         const Tensor& kl, const Tensor& moments, int threads) {
  GaeArgs args{};
  args.dtype = common_dtype({&values, &bootstrap, &rewards, &scores, &logprobs, &ref_logprobs});
  args.rows = rows(values, cu_seqlens);
  args.mask = tokens(mask);
  args.values = tokens(values);
  args.bootstrap = per_sequence(bootstrap);
  args.rewards = tokens(rewards);
  args.scores = per_sequence(scores);
  args.logprobs = tokens(logprobs);
  args.ref_logprobs = tokens(ref_logprobs);
  args.kl_estimator = KL(kl_estimator);
  args.kl_coef = kl_coef;
  args.gamma = gamma;
  args.lam = lam;
  args.advantages = tokens(advantages);
  args.returns = tokens(returns);
  args.kl = per_sequence(kl);
  args.threads = threads_for(token_count(args.rows), threads);
  std::vector<GaePiece> pieces = gae_pieces(args.rows);
  args.pieces = pieces.data();
  args.piece_count = int64_t(pieces.size());
  Moments found{};
  args.moments = &found;
  active_isa().kernels->gae(args);
  if (moments) {
    const double numbers[] = {found.count, found.mean, found.m2};
    store_numbers(numbers, 3, args.dtype, moments);
  }
}

LogitRows logit_rows(const Tensor& logits) {
  return {logits.data(), logits.dtype(), logits.size(logits.dims() - 1), logits.dims() - 1,
          logits.shape(), logits.strides()};
}

int64_t row_count(const LogitRows& logits) {
  int64_t count = 1;
  for (int d = 0; d < logits.dims; ++d) count *= logits.shape[d];
  return count;
}

// Returns the index of the first target that is not a class (-1 where all are), computing nothing.
// With `sums`, the logits are those of some of the classes, in a series of calls from the first to
// the last; the last one gives the results.
int64_t token_logprobs(const Tensor& logits, const Tensor& targets, double temperature,
                       double softcap, const Tensor& logprobs, const Tensor& entropy,
                       const Tensor& state, const Tensor& sums, int64_t first_class,
                       int64_t classes, int threads) {
  LogprobForward args{};
  args.logits = logit_rows(logits);
  args.count = row_count(args.logits);
  args.targets = targets.data<const int64_t>();
  args.temperature = temperature;
  args.softcap = softcap;
  args.first_class = first_class;
  args.classes = classes;
  args.sums = sums.data<RowSums>();
  args.logprobs = logprobs.data();
  args.entropy = entropy.data();
  args.state = state.data();
  args.threads = threads_for(args.count * args.logits.vocab, threads);
  for (int64_t i = 0; i < args.count; ++i) {
    const int64_t y = args.targets[i];
    if (y != -100 && (y < 0 || y >= classes)) return i;
  }
  active_isa().kernels->token_logprobs(args);
  return -1;
}

void token_logprobs_backward(const Tensor& logits, const Tensor& targets, double temperature,
                             double softcap, const Tensor& grad_logprobs,
                             const Tensor& grad_entropy, const Tensor& logprobs,
                             const Tensor& entropy, const Tensor& state, const Tensor& grad_logits,
                             int threads) {
  LogprobBackward args{};
  args.logits = logit_rows(logits);
  args.count = row_count(args.logits);
  args.targets = targets.data<const int64_t>();
  args.temperature = temperature;
  args.softcap = softcap;
  args.grad_logprobs = grad_logprobs.data();
  args.grad_entropy = grad_entropy.data();
  args.logprobs = logprobs.data();
  args.entropy = entropy.data();
  args.state = state.data();
  args.grad_logits = grad_logits.data();
  args.threads = threads_for(args.count * args.logits.vocab, threads);
  active_isa().kernels->token_logprobs_backward(args);
}

// `offsets` [N] are int64 and contiguous; without them row i has counter offset + i.
void sample(const Tensor& logits, double temperature, int64_t top_k, double top_p, int64_t seed,
            int64_t offset, const Tensor& offsets, const Tensor& tokens, const Tensor& logprobs,
            int threads) {
  SampleArgs args{};
  args.logits = logit_rows(logits);
  args.count = row_count(args.logits);
  args.temperature = temperature;
  args.top_k = top_k < args.logits.vocab ? top_k : 0;
  args.top_p = top_p;
  args.seed = uint64_t(seed);
  args.offset = offset;
  args.offsets = offsets ? offsets.data<const int64_t>() : nullptr;
  args.tokens = tokens.data<int64_t>();
  args.logprobs = logprobs.data();
  args.threads = threads_for(args.count * args.logits.vocab, threads);
  args.tasks = args.count;
  std::unique_ptr<char[]> lists;
  if (args.top_k > 0 || args.top_p < 1) {
    args.tasks = std::min<int64_t>(args.count, args.threads);
    const int64_t width = args.logits.dtype == DType::f64 ? sizeof(double) : sizeof(float);
    lists.reset(new char[size_t(2 * args.tasks * (args.logits.vocab + kListRoom) * width)]);
    args.lists = lists.get();
  }
  active_isa().kernels->sample(args);
}

// The token tensors of a loss. Where nothing depends on the sequences and the rows of every tensor
// follow one another in memory, they are taken as one long row.
LossTokens loss_tokens(DType dtype, const Rows& rows, bool needs_sequences, int reduction,
                       double normalizer, int threads, const std::vector<Tokens*>& tensors,
                       std::vector<double>& row_weights) {
  LossTokens t{};
  t.dtype = dtype;
  t.rows = rows;
  t.reduction = Reduction(reduction);
  t.normalizer = normalizer;
  t.threads = threads_for(token_count(t.rows), threads);
  if (t.reduction == Reduction::sequence_mean) {
    row_weights.resize(size_t(t.rows.count));
    t.row_weights = row_weights.data();
    needs_sequences = true;
  }
  if (needs_sequences) return t;
  if (t.rows.cu_seqlens != nullptr) {
    t.rows = {1, t.rows.length, nullptr};
  } else {
    const int64_t length = t.rows.length;
    const bool one_row = std::all_of(tensors.begin(), tensors.end(), [&](const Tokens* x) {
      return x->data == nullptr || length == 1 || x->row_stride == length * x->stride;
    });
    if (one_row) {
      for (Tokens* x : tensors) x->stride = length == 1 ? x->row_stride : x->stride;
      t.rows = {1, token_count(t.rows), nullptr};
    }
  }
  return t;
}

size_t loss_blocks(int64_t count) {
  return size_t((count + kTokensPerBlock - 1) / kTokensPerBlock);
}

// The first number is the loss, the others its statistics.
void store_results(DType dtype, const double* results, int64_t count, const Tensor& loss,
                   const Tensor& stats) {
  store_numbers(results, 1, dtype, loss);
  store_numbers(results + 1, count - 1, dtype, stats);
}

using Whitening = std::tuple<double, double>;       // A becomes (A - mean) * scale
using Clips = std::tuple<double, double, double>;   // low, high, dual clip
using Reducing = std::tuple<int, double>;           // Reduction, normalizer

void ppo_policy_loss(const Tensor& mask, const Tensor& cu_seqlens, const Tensor& logprobs,
                     const Tensor& old_logprobs, const Tensor& advantages,
                     const Whitening& whitening, const Tensor& is_weights, const Clips& clips,
                     const Tensor& entropy, double entropy_coef, const Tensor& ref_logprobs,
                     double kl_coef, int kl_estimator, int objective, int ratio_level,
                     const Reducing& reducing, const Tensor& loss, const Tensor& stats,
                     const Tensor& grad_logprobs, const Tensor& grad_entropy, int threads) {
  PolicyLossArgs args{};
  Tokens mask_tokens = tokens(mask);
  args.logprobs = tokens(logprobs);
  args.old_logprobs = tokens(old_logprobs);
  args.advantages = tokens(advantages);
  args.advantage_mean = std::get<0>(whitening);
  args.advantage_scale = std::get<1>(whitening);
  args.is_weights = tokens(is_weights);
  args.clip_low = std::get<0>(clips);
  args.clip_high = std::get<1>(clips);
  args.dual_clip = std::get<2>(clips);
  args.entropy = tokens(entropy);
  args.entropy_coef = entropy_coef;
  args.ref_logprobs = tokens(ref_logprobs);
  args.kl_coef = kl_coef;
  args.kl_estimator = KL(kl_estimator);
  args.objective = Objective(objective);
  args.ratio_level = RatioLevel(ratio_level);
  args.grad_logprobs = tokens(grad_logprobs);
  args.grad_entropy = tokens(grad_entropy);
  const DType dtype = common_dtype({&logprobs, &old_logprobs, &advantages, &is_weights, &entropy,
                                    &ref_logprobs});
  const bool of_sequences = args.ratio_level == RatioLevel::sequence;
  std::vector<double> row_weights, log_ratios;
  args.tokens = loss_tokens(dtype, rows(logprobs, cu_seqlens), of_sequences,
                            std::get<0>(reducing), std::get<1>(reducing), threads,
                            {&mask_tokens, &args.logprobs, &args.old_logprobs, &args.advantages,
                             &args.is_weights, &args.entropy, &args.ref_logprobs,
                             &args.grad_logprobs, &args.grad_entropy}, row_weights);
  args.tokens.mask = mask_tokens;
  if (of_sequences) log_ratios.resize(size_t(args.tokens.rows.count));
  args.log_ratios = log_ratios.data();
  std::vector<PolicySums> sums(loss_blocks(token_count(args.tokens.rows)));
  args.sums = sums.data();
  double results[7];
  args.results = results;
  active_isa().kernels->ppo_policy_loss(args);
  store_results(dtype, results, 7, loss, stats);
}

void ppo_value_loss(const Tensor& mask, const Tensor& cu_seqlens, const Tensor& values,
                    const Tensor& old_values, const Tensor& returns, double clip_range,
                    const Reducing& reducing, const Tensor& loss, const Tensor& stats,
                    const Tensor& grad_values, int threads) {
  ValueLossArgs args{};
  Tokens mask_tokens = tokens(mask);
  args.values = tokens(values);
  args.old_values = tokens(old_values);
  args.returns = tokens(returns);
  args.clip_range = clip_range;
  args.grad_values = tokens(grad_values);
  const DType dtype = common_dtype({&values, &old_values, &returns});
  std::vector<double> row_weights;
  args.tokens = loss_tokens(dtype, rows(values, cu_seqlens), false, std::get<0>(reducing),
                            std::get<1>(reducing), threads,
                            {&mask_tokens, &args.values, &args.old_values, &args.returns,
                             &args.grad_values}, row_weights);
  args.tokens.mask = mask_tokens;
  std::vector<ValueSums> sums(loss_blocks(token_count(args.tokens.rows)));
  args.sums = sums.data();
  double results[6];
  args.results = results;
  active_isa().kernels->ppo_value_loss(args);
  store_results(dtype, results, 6, loss, stats);
}

void pairwise_loss(const Tensor& chosen, const Tensor& rejected, const Tensor& margins,
                   double margin, double center_coef, const Tensor& loss, const Tensor& stats,
                   const Tensor& grad_chosen, const Tensor& grad_rejected, int threads) {
  PairwiseLossArgs args{};
  args.dtype = common_dtype({&chosen, &rejected, &margins});
  args.count = chosen.size(0);
  args.chosen = tokens(chosen);
  args.rejected = tokens(rejected);
  args.margins = tokens(margins);
  args.margin = margin;
  args.center_coef = center_coef;
  args.grad_chosen = tokens(grad_chosen);
  args.grad_rejected = tokens(grad_rejected);
  args.threads = threads_for(args.count, threads);
  std::vector<PairwiseSums> sums(loss_blocks(args.count));
  args.sums = sums.data();
  double results[3];
  args.results = results;
  active_isa().kernels->pairwise_loss(args);
  store_results(args.dtype, results, 3, loss, stats);
}

void ranking_loss(const Tensor& scores, const Tensor& ranks, const Tensor& loss,
                  const Tensor& stats, const Tensor& grad_scores, int threads) {
  constexpr int64_t pairs_per_block = 65536;
  RankingLossArgs args{};
  args.dtype = scores.dtype();
  args.prompts = scores.size(0);
  args.responses = scores.size(1);
  args.scores = tokens(scores);
  args.ranks = tokens(ranks);
  args.ranks_are_int64 = ranks.is_int64();
  args.grad_scores = tokens(grad_scores);
  const int64_t pairs = std::max<int64_t>(args.responses * args.responses / 2, 1);
  args.prompts_per_block = std::max<int64_t>(pairs_per_block / pairs, 1);
  args.threads = threads_for(args.prompts * pairs, threads);
  std::vector<RankingSums> sums(size_t(args.prompts / args.prompts_per_block + 1));
  args.sums = sums.data();
  double results[3];
  args.results = results;
  active_isa().kernels->ranking_loss(args);
  store_results(args.dtype, results, 3, loss, stats);
}

Heads heads(const Tensor& x) {
  return {x.data(), x.stride(0), x.stride(1), x.dims() == 4 ? x.stride(2) : 0};
}

// Returns the index of the first length that no row of keys has (-1 where all are right), computing
// nothing then.
int64_t decode_attention(const Tensor& query, const Tensor& keys, const Tensor& values,
                         const Tensor& lengths, double scale, double softcap, int64_t window,
                         const Tensor& sinks, const Tensor& new_keys, const Tensor& new_values,
                         const Tensor& out, int threads) {
  DecodeAttention args{};
  args.query_dtype = query.dtype();
  args.dtype = common_dtype({&keys, &values});
  args.rows = query.size(0);
  args.kv_heads = keys.size(1);
  args.group = query.size(1) / std::max<int64_t>(args.kv_heads, 1);
  args.width = query.size(2);
  args.value_width = values.size(3);
  args.query = heads(query);
  args.keys = heads(keys);
  args.values = heads(values);
  if (new_keys) {
    args.new_keys = heads(new_keys);
    args.new_values = heads(new_values);
    args.new_keys_dtype = new_keys.dtype();
    args.new_values_dtype = new_values.dtype();
  }
  args.lengths = lengths.data<const int64_t>();
  args.scale = scale;
  args.softcap = softcap;
  args.window = window;
  args.sinks = sinks.data();
  args.out = out.data();
  int64_t longest = 0, all = 0;
  for (int64_t b = 0; b < args.rows; ++b) {
    const int64_t length = args.lengths[b];
    if (length < 0 || length > keys.size(2)) return b;
    longest = std::max(longest, std::min(length, window));
    all += std::min(length, window);
  }
  args.pieces = std::max<int64_t>((longest + kKeysPerPiece - 1) / kKeysPerPiece, 1);
  std::vector<double> parts;
  if (args.pieces > 1) {
    parts.resize(size_t(out.size(0) * out.size(1) * args.pieces * (args.value_width + 2)));
    args.parts = parts.data();
  }
  args.threads = threads_for(all * args.kv_heads * (args.width + args.value_width), threads);
  active_isa().kernels->decode_attention(args);
  return -1;
}

using Tensors = std::vector<Tensor>;

// As many contiguous tensors of each kind, of one dtype for each; without remainders of float32, and
// without scales of moments in float32.
void adamw(const Tensors& weights, const Tensors& grads, const Tensors& exp_avg,
           const Tensors& exp_avg_sq, const Tensors& remainder, const Tensors& scales, double decay,
           double size, double root, double mix, bool near_mean, double beta2, double rest,
           double eps, double grad_scale, int threads) {
  AdamWArgs args{};
  args.weights = weights[0].dtype();
  args.grads = grads[0].dtype();
  args.eight_bits = !scales.empty();
  std::vector<AdamWTensor> tensors;
  std::vector<AdamWPiece> pieces;
  int64_t all = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    int64_t count = 1;
    for (int d = 0; d < weights[i].dims(); ++d) count *= weights[i].size(d);
    tensors.push_back({weights[i].data(), remainder.empty() ? nullptr : remainder[i].data<uint16_t>(),
                       grads[i].data(), exp_avg[i].data(), exp_avg_sq[i].data(),
                       scales.empty() ? nullptr : scales[i].data<float>(), count});
    for (int64_t first = 0; first < count; first += kElementsPerPiece) {
      pieces.push_back({int64_t(i), first, std::min(count, first + kElementsPerPiece)});
    }
    all += count;
  }
  args.tensors = tensors.data();
  args.pieces = pieces.data();
  args.piece_count = int64_t(pieces.size());
  args.decay = float(decay);
  args.size = float(size);
  args.root = float(root);
  args.mix = float(mix);
  args.near_mean = near_mean;
  args.beta2 = float(beta2);
  args.rest = float(rest);
  args.eps = float(eps);
  args.grad_scale = float(grad_scale);
  args.threads = threads_for(all, threads);
  active_isa().kernels->adamw(args);
}

// Arguments of both passes, but for what is written.
RmsNorm rms_norm_args(const Tensor& x, const Tensor& weight, double eps, double added,
                      int threads) {
  RmsNorm args{};
  args.x = logit_rows(x);
  args.count = row_count(args.x);
  args.weight = weight.data();
  args.weight_dtype = weight.dtype();
  args.eps = eps;
  args.added = added;
  args.threads = threads_for(args.count * args.x.vocab, threads);
  return args;
}

void rms_norm(const Tensor& x, const Tensor& weight, double eps, double added, const Tensor& y,
              int threads) {
  RmsNorm args = rms_norm_args(x, weight, eps, added, threads);
  args.y = y.data();
  args.y_dtype = y.dtype();
  if (args.count * args.x.vocab == 0) return;
  const std::unique_ptr<double[]> scratch(new double[size_t(args.x.vocab)]);
  args.scratch = scratch.get();
  active_isa().kernels->rms_norm(args);
}

void rms_norm_backward(const Tensor& grad_y, const Tensor& x, const Tensor& weight, double eps,
                       double added, const Tensor& grad_x, const Tensor& grad_weight,
                       int threads) {
  RmsNorm args = rms_norm_args(x, weight, eps, added, threads);
  args.grad_y = logit_rows(grad_y);
  args.grad_x = grad_x.data();
  args.grad_weight = grad_weight.data();
  const int64_t parts = grad_weight ? (args.count + kNormRows - 1) / kNormRows : 0;
  const size_t size = args.x.dtype == DType::f64 ? sizeof(double) : sizeof(float);
  const std::unique_ptr<char[]> scratch(new char[size_t((1 + parts) * args.x.vocab) * size]);
  args.scratch = scratch.get();
  active_isa().kernels->rms_norm_backward(args);
}

RotatedHeads rotated_heads(const Tensor& x, const Tensor& out) {
  return {heads(x), x.size(1), out.data()};
}

Tokens angles(const Tensor& x, int64_t rows) {  // [rows, T, R], or [1, T, R]
  return {x.data(), x.size(0) == rows ? x.stride(0) : 0, x.stride(1)};
}

void rotary_embedding(const Tensor& query, const Tensor& key, const Tensor& cos, const Tensor& sin,
                      bool transposed, const Tensor& out_query, const Tensor& out_key,
                      int threads) {
  RotaryEmbedding args{};
  args.dtype = common_dtype({&query, &key, &out_query, &out_key});
  args.angles_dtype = common_dtype({&cos, &sin});
  args.rows = query.size(0);
  args.tokens = query.size(2);
  args.width = query.size(3);
  args.rotated = cos.size(2);
  args.transposed = transposed;
  args.cos = angles(cos, args.rows);
  args.sin = angles(sin, args.rows);
  args.query = rotated_heads(query, out_query);
  args.key = rotated_heads(key, out_key);
  const int64_t numbers = (args.query.count + args.key.count) * args.width;
  args.threads = threads_for(args.rows * args.tokens * numbers, threads);
  active_isa().kernels->rotary_embedding(args);
}

// `x` as the rows of swiglu: one, where all tensors are contiguous.
LogitRows swiglu_rows(const Tensor& x, bool one_row, int64_t numbers) {
  if (one_row) return {x.data(), x.dtype(), numbers, 0, nullptr, nullptr};
  return logit_rows(x);
}

// Arguments of both passes, but for what is written. grad_y is absent of a forward pass.
SwiGLU swiglu_args(const Tensor& gate, const Tensor& up, const Tensor& grad_y, int threads) {
  SwiGLU args{};
  int64_t numbers = 1;
  for (int d = 0; d < gate.dims(); ++d) numbers *= gate.size(d);
  const bool one_row = gate.is_contiguous() && up.is_contiguous() &&
                       (!grad_y || grad_y.is_contiguous());
  args.gate = swiglu_rows(gate, one_row, numbers);
  args.up = swiglu_rows(up, one_row, numbers);
  if (grad_y) args.grad_y = swiglu_rows(grad_y, one_row, numbers);
  args.count = row_count(args.gate);
  args.threads = threads_for(numbers, threads);
  return args;
}

void swiglu(const Tensor& gate, const Tensor& up, const Tensor& y, int threads) {
  common_dtype({&gate, &up, &y});
  SwiGLU args = swiglu_args(gate, up, Tensor(), threads);
  args.y = y.data();
  active_isa().kernels->swiglu(args);
}

void swiglu_backward(const Tensor& grad_y, const Tensor& gate, const Tensor& up,
                     const Tensor& grad_gate, const Tensor& grad_up, int threads) {
  common_dtype({&grad_y, &gate, &up, &grad_gate, &grad_up});
  SwiGLU args = swiglu_args(gate, up, grad_y, threads);
  args.grad_gate = grad_gate.data();
  args.grad_up = grad_up.data();
  active_isa().kernels->swiglu_backward(args);
}

// Whether `x` is a torch.Tensor or a Parameter itself, with memory; `found` is its view then.
bool is_plain(py::handle x, Tensor& found) {
  static const py::handle torch = py::module_::import("torch").release();
  static const py::handle tensor_type = py::object(torch.attr("Tensor")).release();
  static const py::handle parameter_type = py::object(torch.attr("nn").attr("Parameter")).release();
  const py::handle type = py::type::handle_of(x);
  return (type.is(tensor_type) || type.is(parameter_type)) && view(x, found);
}

// Whether this CPU, and the instruction set in use, multiply bfloat16 themselves.
bool multiplies_bf16() {
#if defined(__x86_64__)
  return active_isa().name == "avx512" && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

void pack_weight(const Tensor& part, int64_t first, int64_t last, const Tensor& panels,
                 int threads) {
  PackWeight args{};
  args.from_dtype = part.dtype();
  args.dtype = panels.dtype();
  args.from = part.data();
  args.count = part.size(0);
  args.in = part.size(1);
  args.out_stride = part.stride(0);
  args.in_stride = part.stride(1);
  args.first = first;
  args.last = last;
  args.panels = panels.data();
  args.threads = threads_for(args.count * args.in, threads);
  active_isa().kernels->pack_weight(args);
}

void packed_linear(const Tensor& x, const Tensor& panels, const Tensor& bias, const Tensor& out,
                   int threads) {
  PackedLinear args{};
  args.x_dtype = x.dtype();
  args.dtype = panels.dtype();
  args.out_dtype = out.dtype();
  // Of any dimensions, contiguous where these are not two.
  const int last = x.dims() - 1;
  args.rows = 1;
  for (int i = 0; i < last; ++i) args.rows *= x.size(i);
  args.in = x.size(last);
  args.outs = out.size(last);
  args.x = x.data();
  args.row_stride = last == 1 ? x.stride(0) : args.in;
  args.panels = panels.data();
  args.bias = bias ? bias.data<const float>() : nullptr;
  args.out = out.data();
  const std::unique_ptr<float[]> tiles(new float[size_t(args.rows * (args.in + 1))]);
  args.tiles = tiles.get();
  args.threads = threads_for(args.outs * args.in, threads);
  active_isa().kernels->packed_linear(args);
}

// Whether these per-token tensors need no closer look: torch.Tensor or Parameter themselves, of
// floating point, of one shape, [B, T] or [N], and on one device, with a mask and boundaries that
// fit. False says nothing: ppo_kernels/checks.py looks closer then.
bool tokens_fit(py::handle mask, py::handle cu_seqlens, bool needs_sequences,
                const py::args& tensors) {
  Tensor first, x;
  for (const py::handle object : tensors) {
    if (object.is_none()) continue;
    if (!is_plain(object, x) || !x.is_floating()) return false;
    if (!first) {
      first = x;
      const bool packed = first.dims() == 1 && (!cu_seqlens.is_none() || !needs_sequences);
      if (!packed && (first.dims() != 2 || !cu_seqlens.is_none())) return false;
    } else if (!x.same_shape(first) || !x.same_device(first)) {
      return false;
    }
  }
  if (!first) return false;
  if (!mask.is_none() && !(is_plain(mask, x) && x.is_bool() && x.same_shape(first) &&
                           x.same_device(first))) {
    return false;
  }
  return cu_seqlens.is_none() || (is_plain(cu_seqlens, x) && x.is_index() && x.dims() == 1 &&
                                  x.size(0) >= 1 && x.same_device(first));
}

// The same of the tensors of rotary_embedding.
bool rotary_fits(py::handle query, py::handle key, py::handle cos, py::handle sin) {
  Tensor q, k, c, s;
  if (!is_plain(query, q) || !is_plain(key, k) || !is_plain(cos, c) || !is_plain(sin, s)) {
    return false;
  }
  for (const Tensor* x : {&q, &k, &c, &s}) {
    if (!x->is_floating() || !x->same_device(q)) return false;
  }
  return q.dims() == 4 && k.dims() == 4 && k.dtype() == q.dtype() && k.size(0) == q.size(0) &&
         k.size(2) == q.size(2) && k.size(3) == q.size(3) && c.dims() == 3 && s.same_shape(c) &&
         (c.size(0) == q.size(0) || c.size(0) == 1) && c.size(1) == q.size(2) &&
         c.size(2) <= q.size(3) && c.size(2) % 2 == 0;
}

}  // namespace
}  // namespace ppo

PYBIND11_MODULE(_cpu, m) {
  using release_gil = py::call_guard<py::gil_scoped_release>;
  m.doc() = "CPU kernels of ppo_kernels. Private: call the ops of ppo_kernels.";
  m.def("isa", [] { return ppo::active_isa().name; }, "The instruction set in use.");
  m.def("supported_isas", [] {
    std::vector<std::string> names;
    for (const auto& isa : ppo::supported_isas()) names.push_back(isa.name);
    return names;
  }, "Those in this binary that this machine runs, best last.");
  m.def("tokens_fit", &ppo::tokens_fit);
  m.def("gae", &ppo::gae, release_gil());
  m.def("token_logprobs", &ppo::token_logprobs, release_gil());
  m.def("token_logprobs_backward", &ppo::token_logprobs_backward, release_gil());
  m.def("ppo_policy_loss", &ppo::ppo_policy_loss, release_gil());
  m.def("ppo_value_loss", &ppo::ppo_value_loss, release_gil());
  m.def("pairwise_loss", &ppo::pairwise_loss, release_gil());
  m.def("ranking_loss", &ppo::ranking_loss, release_gil());
  m.def("sample", &ppo::sample, release_gil());
  m.def("decode_attention", &ppo::decode_attention, release_gil());
  m.def("adamw", &ppo::adamw, release_gil());
  m.def("rms_norm", &ppo::rms_norm, release_gil());
  m.def("rms_norm_backward", &ppo::rms_norm_backward, release_gil());
  m.def("rotary_fits", &ppo::rotary_fits);
  m.def("rotary_embedding", &ppo::rotary_embedding, release_gil());
  m.def("swiglu", &ppo::swiglu, release_gil());
  m.def("swiglu_backward", &ppo::swiglu_backward, release_gil());
  m.attr("panel") = ppo::kPanel;
  m.def("multiplies_bf16", &ppo::multiplies_bf16);
  m.def("pack_weight", &ppo::pack_weight, release_gil());
  m.def("packed_linear", &ppo::packed_linear, release_gil());
}
