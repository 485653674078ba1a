// What the losses have in common: which tokens they are taken over, and where results go.
#pragma once

#include <algorithm>
#include <tuple>
#include <vector>

#include "arguments.h"

namespace ppo {
namespace {

using Reducing = std::tuple<int, double>;  // Reduction, normalizer

// The token tensors of a loss. Where nothing depends on the sequences and the rows of every tensor
// follow one another in memory, they are taken as one long row.
LossTokens loss_tokens(DType dtype, const Rows& rows, const Tensor& mask, bool needs_sequences,
                       const Reducing& reducing, int threads, std::vector<Tokens*> tensors,
                       std::vector<double>& row_weights) {
  LossTokens t{};
  t.dtype = dtype;
  t.rows = rows;
  t.mask = tokens(mask);
  t.reduction = Reduction(std::get<0>(reducing));
  t.normalizer = std::get<1>(reducing);
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
    tensors.push_back(&t.mask);
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

}  // namespace
}  // namespace ppo
