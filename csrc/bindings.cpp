// The Python face of the CPU kernels. Torch-free: tensors come as addresses, shapes and strides (in
// elements). ppo_kernels/<op>.py has checked them, and holds the tensors until the call returns;
// what memory safety hangs on and only the data can tell (cu_seqlens, targets) is checked here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/isa.h"
#include "cpu/ops.h"

namespace py = pybind11;

namespace ppo {
namespace {

using TokensTuple = std::tuple<uintptr_t, int64_t, int64_t>;  // see ppo_kernels/dispatch.py: tokens
using RowsTuple = std::tuple<int64_t, int64_t, uintptr_t>;    // rows
using Strides = std::vector<int64_t>;

void* pointer(uintptr_t address) { return reinterpret_cast<void*>(address); }

Tokens tokens(const TokensTuple& t) {
  return {pointer(std::get<0>(t)), std::get<1>(t), std::get<2>(t)};
}

Rows rows(const RowsTuple& r) {
  const Rows rows{std::get<0>(r), std::get<1>(r),
                  static_cast<const int64_t*>(pointer(std::get<2>(r)))};
  if (rows.cu_seqlens == nullptr) return rows;
  const int64_t* cu = rows.cu_seqlens;
  bool valid = rows.count >= 0 && cu[0] == 0 && cu[rows.count] == rows.length;
  for (int64_t b = 0; valid && b < rows.count; ++b) valid = cu[b] <= cu[b + 1];
  if (!valid) {
    throw std::invalid_argument("cu_seqlens must start with 0, never fall and end with the number "
                                "of tokens, " + std::to_string(rows.length));
  }
  return rows;
}

int64_t token_count(const Rows& rows) {
  return rows.cu_seqlens ? rows.length : rows.count * rows.length;
}

// Waking a thread takes as long as this many elements of simple work.
int threads_for(int64_t elements, int threads) {
  constexpr int64_t worth_waking = 16384;
  return elements < worth_waking ? 1 : threads;
}

// How many rows one task takes: about 8,192 tokens. Fixed by the shape, so that sums merged block
// by block do not depend on the number of threads.
int64_t rows_per_block(const Rows& rows) {
  const int64_t tokens = token_count(rows);
  if (tokens == 0) return rows.count > 0 ? rows.count : 1;
  const int64_t per_block = 8192 * rows.count / tokens;
  return per_block > 1 ? per_block : 1;
}

// Returns (count, mean, M2) of the advantages.
std::tuple<double, double, double> gae(int dtype, const RowsTuple& rows_, const TokensTuple& mask,
                                       const TokensTuple& values, const TokensTuple& bootstrap,
                                       const TokensTuple& rewards, const TokensTuple& scores,
                                       const TokensTuple& logprobs, const TokensTuple& ref_logprobs,
                                       int kl_estimator, double kl_coef, double gamma, double lam,
                                       const TokensTuple& advantages, const TokensTuple& returns,
                                       const TokensTuple& kl, bool want_moments, int threads) {
  GaeArgs args{};
  args.dtype = DType(dtype);
  args.rows = rows(rows_);
  args.mask = tokens(mask);
  args.values = tokens(values);
  args.bootstrap = tokens(bootstrap);
  args.rewards = tokens(rewards);
  args.scores = tokens(scores);
  args.logprobs = tokens(logprobs);
  args.ref_logprobs = tokens(ref_logprobs);
  args.kl_estimator = KL(kl_estimator);
  args.kl_coef = kl_coef;
  args.gamma = gamma;
  args.lam = lam;
  args.advantages = tokens(advantages);
  args.returns = tokens(returns);
  args.kl = tokens(kl);
  args.rows_per_block = rows_per_block(args.rows);
  args.threads = threads_for(token_count(args.rows), threads);
  std::vector<Moments> moments;
  if (want_moments) {
    moments.resize(size_t(args.rows.count / args.rows_per_block + 1), Moments{0, 0, 0});
    args.moments = moments.data();
  }
  active_isa().kernels->gae(args);
  if (!want_moments) return {0, 0, 0};
  return {moments[0].count, moments[0].mean, moments[0].m2};
}

LogitRows logit_rows(int dtype, uintptr_t data, const Strides& shape, const Strides& strides) {
  return {pointer(data), DType(dtype), shape.back(), int(shape.size()) - 1, shape.data(),
          strides.data()};
}

// Returns the place of the first target that is no class (-1 where all are), computing nothing.
int64_t token_logprobs(int dtype, uintptr_t logits, const Strides& shape, const Strides& strides,
                       int64_t count, uintptr_t targets, double temperature, uintptr_t logprobs,
                       uintptr_t entropy, uintptr_t state, int threads) {
  LogprobForward args{};
  args.logits = logit_rows(dtype, logits, shape, strides);
  args.count = count;
  args.targets = static_cast<const int64_t*>(pointer(targets));
  args.temperature = temperature;
  args.logprobs = pointer(logprobs);
  args.entropy = pointer(entropy);
  args.state = pointer(state);
  args.threads = threads_for(count * args.logits.vocab, threads);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t y = args.targets[i];
    if (y != -100 && (y < 0 || y >= args.logits.vocab)) return i;
  }
  active_isa().kernels->token_logprobs(args);
  return -1;
}

void token_logprobs_backward(int dtype, uintptr_t logits, const Strides& shape,
                             const Strides& strides, int64_t count, uintptr_t targets,
                             double temperature, uintptr_t grad_logprobs, uintptr_t grad_entropy,
                             uintptr_t logprobs, uintptr_t entropy, uintptr_t state,
                             uintptr_t grad_logits, int threads) {
  LogprobBackward args{};
  args.logits = logit_rows(dtype, logits, shape, strides);
  args.count = count;
  args.targets = static_cast<const int64_t*>(pointer(targets));
  args.temperature = temperature;
  args.grad_logprobs = pointer(grad_logprobs);
  args.grad_entropy = pointer(grad_entropy);
  args.logprobs = pointer(logprobs);
  args.entropy = pointer(entropy);
  args.state = pointer(state);
  args.grad_logits = pointer(grad_logits);
  args.threads = threads_for(count * args.logits.vocab, threads);
  active_isa().kernels->token_logprobs_backward(args);
}

// The token tensors of a loss. Where nothing hangs on the sequences and the rows of every tensor
// follow one another in memory, they are taken as one long row.
LossTokens loss_tokens(int dtype, const RowsTuple& rows_, int reduction, double normalizer,
                       int threads, const std::vector<Tokens*>& tensors,
                       std::vector<double>& row_weights) {
  LossTokens t{};
  t.dtype = DType(dtype);
  t.rows = rows(rows_);
  t.reduction = Reduction(reduction);
  t.normalizer = normalizer;
  t.threads = threads_for(token_count(t.rows), threads);
  if (t.reduction == Reduction::sequence_mean) {
    row_weights.resize(size_t(t.rows.count));
    t.row_weights = row_weights.data();
  } else if (t.rows.cu_seqlens != nullptr) {
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

// `loss` and `stats` are outputs in the accumulation dtype, one number and the rest of `results`.
void store_results(int dtype, const double* results, size_t count, uintptr_t loss,
                   uintptr_t stats) {
  for (size_t i = 0; i < count; ++i) {
    const uintptr_t to = i == 0 ? loss : stats;
    const size_t at = i == 0 ? 0 : i - 1;
    if (DType(dtype) == DType::f64) {
      static_cast<double*>(pointer(to))[at] = results[i];
    } else {
      static_cast<float*>(pointer(to))[at] = float(results[i]);
    }
  }
}

using Advantages = std::tuple<TokensTuple, double, double>;       // A, to become (A - mean) * scale
using Clips = std::tuple<double, double, double>;                 // low, high, dual clip
using EntropyTerm = std::tuple<TokensTuple, double>;              // entropy, its coefficient
using KLTerm = std::tuple<TokensTuple, double, int>;              // reference, coefficient, KL
using Reducing = std::tuple<int, double>;                         // Reduction, normalizer

void ppo_policy_loss(int dtype, const RowsTuple& rows_, const TokensTuple& mask,
                     const TokensTuple& logprobs, const TokensTuple& old_logprobs,
                     const Advantages& advantages, const TokensTuple& is_weights,
                     const Clips& clips, const EntropyTerm& entropy, const KLTerm& kl,
                     const Reducing& reducing, uintptr_t loss, uintptr_t stats,
                     const TokensTuple& grad_logprobs, const TokensTuple& grad_entropy,
                     int threads) {
  PolicyLossArgs args{};
  Tokens mask_tokens = tokens(mask);
  args.logprobs = tokens(logprobs);
  args.old_logprobs = tokens(old_logprobs);
  args.advantages = tokens(std::get<0>(advantages));
  args.advantage_mean = std::get<1>(advantages);
  args.advantage_scale = std::get<2>(advantages);
  args.is_weights = tokens(is_weights);
  args.clip_low = std::get<0>(clips);
  args.clip_high = std::get<1>(clips);
  args.dual_clip = std::get<2>(clips);
  args.entropy = tokens(std::get<0>(entropy));
  args.entropy_coef = std::get<1>(entropy);
  args.ref_logprobs = tokens(std::get<0>(kl));
  args.kl_coef = std::get<1>(kl);
  args.kl_estimator = KL(std::get<2>(kl));
  args.grad_logprobs = tokens(grad_logprobs);
  args.grad_entropy = tokens(grad_entropy);
  std::vector<double> row_weights;
  args.tokens = loss_tokens(dtype, rows_, std::get<0>(reducing), std::get<1>(reducing), threads,
                            {&mask_tokens, &args.logprobs, &args.old_logprobs, &args.advantages,
                             &args.is_weights, &args.entropy, &args.ref_logprobs,
                             &args.grad_logprobs, &args.grad_entropy}, row_weights);
  args.tokens.mask = mask_tokens;
  std::vector<PolicySums> sums(loss_blocks(token_count(args.tokens.rows)));
  args.sums = sums.data();
  double results[7];
  args.results = results;
  active_isa().kernels->ppo_policy_loss(args);
  store_results(dtype, results, 7, loss, stats);
}

void ppo_value_loss(int dtype, const RowsTuple& rows_, const TokensTuple& mask,
                    const TokensTuple& values, const TokensTuple& old_values,
                    const TokensTuple& returns, double clip_range, const Reducing& reducing,
                    uintptr_t loss, uintptr_t stats, const TokensTuple& grad_values, int threads) {
  ValueLossArgs args{};
  Tokens mask_tokens = tokens(mask);
  args.values = tokens(values);
  args.old_values = tokens(old_values);
  args.returns = tokens(returns);
  args.clip_range = clip_range;
  args.grad_values = tokens(grad_values);
  std::vector<double> row_weights;
  args.tokens = loss_tokens(dtype, rows_, std::get<0>(reducing), std::get<1>(reducing), threads,
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

void pairwise_loss(int dtype, int64_t count, const TokensTuple& chosen, const TokensTuple& rejected,
                   const TokensTuple& margins, double margin, double center_coef, uintptr_t loss,
                   uintptr_t stats, const TokensTuple& grad_chosen,
                   const TokensTuple& grad_rejected, int threads) {
  PairwiseLossArgs args{};
  args.dtype = DType(dtype);
  args.count = count;
  args.chosen = tokens(chosen);
  args.rejected = tokens(rejected);
  args.margins = tokens(margins);
  args.margin = margin;
  args.center_coef = center_coef;
  args.grad_chosen = tokens(grad_chosen);
  args.grad_rejected = tokens(grad_rejected);
  args.threads = threads_for(count, threads);
  std::vector<PairwiseSums> sums(loss_blocks(count));
  args.sums = sums.data();
  double results[3];
  args.results = results;
  active_isa().kernels->pairwise_loss(args);
  store_results(dtype, results, 3, loss, stats);
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
  m.def("gae", &ppo::gae, release_gil());
  m.def("token_logprobs", &ppo::token_logprobs, release_gil());
  m.def("token_logprobs_backward", &ppo::token_logprobs_backward, release_gil());
  m.def("ppo_policy_loss", &ppo::ppo_policy_loss, release_gil());
  m.def("ppo_value_loss", &ppo::ppo_value_loss, release_gil());
  m.def("pairwise_loss", &ppo::pairwise_loss, release_gil());
}
