// How a loss iterates over its tokens, block by block, and its denominator. Anonymous
// namespace: see ops.h.
//
// Blocks of tokens are of a fixed size, summed in float64, and merged in order, so that results are
// the same bits for any number of threads.
#pragma once

#include "threads.h"
#include "tokens.h"

namespace ppo::PPO_ISA {
namespace {

inline int64_t token_count(const Rows& rows) {
  return rows.cu_seqlens ? rows.length : rows.count * rows.length;
}

inline int64_t block_count(const Rows& rows) {
  return (token_count(rows) + kTokensPerBlock - 1) / kTokensPerBlock;
}

// Calls body(b, first, last) for each piece of a row in a block: tokens first to last of row b.
template <class Body>
void for_pieces(const Rows& rows, int64_t block, const Body& body) {
  const int64_t* cu = rows.cu_seqlens;
  int64_t token = block * kTokensPerBlock;
  const int64_t total = token_count(rows);
  const int64_t end = token + kTokensPerBlock < total ? token + kTokensPerBlock : total;
  int64_t b = 0;
  if (cu == nullptr) {
    b = token / rows.length;
  } else {
    for (int64_t above = rows.count; above - b > 1;) {  // cu[b] <= token < cu[above]
      const int64_t middle = b + (above - b) / 2;
      (cu[middle] <= token ? b : above) = middle;
    }
  }
  for (; token < end; ++b) {
    const int64_t row_start = cu ? cu[b] : b * rows.length;
    const int64_t first = token - row_start;
    const int64_t size = row_size(rows, b);
    const int64_t last = end - row_start < size ? end - row_start : size;
    body(b, first, last);
    token = row_start + last;
  }
}

inline int64_t count_real(const LossTokens& tokens, int64_t b, int64_t first, int64_t last) {
  const Row<const uint8_t> mask = row_of<const uint8_t>(tokens.mask, tokens.rows, b);
  if (!mask) return last - first;
  int64_t count = 0;
  if (mask.stride == 1) {  // apart, so that the compiler may take many at a time
    for (const uint8_t* m = mask.data + first; m < mask.data + last; ++m) count += *m != 0;
  } else {
    for (int64_t t = first; t < last; ++t) count += mask[t] != 0;
  }
  return count;
}

// What the sum of the row-weighted token losses is divided by. Fills in row_weights, 1 over the
// number of each sequence's real tokens. `sums` (any with a count) is scratch.
template <class Sums>
double denominator(const LossTokens& tokens, Sums* sums) {
  const Rows& rows = tokens.rows;
  double found = 1;
  if (tokens.reduction == Reduction::sequence_mean) {
    constexpr int64_t per_task = 64;
    parallel_for((rows.count + per_task - 1) / per_task, tokens.threads, [&](int64_t task) {
      for (int64_t b = task * per_task; b < rows.count && b < (task + 1) * per_task; ++b) {
        const int64_t count = count_real(tokens, b, 0, row_size(rows, b));
        tokens.row_weights[b] = count ? 1.0 / double(count) : 0;
      }
    });
    found = 0;
    for (int64_t b = 0; b < rows.count; ++b) found += tokens.row_weights[b] > 0;
  } else if (tokens.reduction == Reduction::token_mean && tokens.normalizer < 0) {
    found = double(token_count(rows));
    if (tokens.mask.data) {
      const int64_t blocks = block_count(rows);
      parallel_for(blocks, tokens.threads, [&](int64_t block) {
        int64_t count = 0;
        for_pieces(rows, block, [&](int64_t b, int64_t first, int64_t last) {
          count += count_real(tokens, b, first, last);
        });
        sums[block].count = double(count);
      });
      found = 0;
      for (int64_t block = 0; block < blocks; ++block) found += sums[block].count;
    }
  }
  if (tokens.normalizer >= 0) found = tokens.normalizer;
  return found == 0 ? 1 : found;
}

// Calls sweep(sum of the block, b, first, last, weight of each token) for every piece of a row.
template <class Sums, class Sweep>
void sweep_blocks(const LossTokens& tokens, double denominator, Sums* sums, const Sweep& sweep) {
  parallel_for(block_count(tokens.rows), tokens.threads, [&](int64_t block) {
    Sums of_block{};
    for_pieces(tokens.rows, block, [&](int64_t b, int64_t first, int64_t last) {
      const double weight = (tokens.row_weights ? tokens.row_weights[b] : 1) / denominator;
      sweep(of_block, b, first, last, weight);
    });
    sums[block] = of_block;
  });
}

}  // namespace
}  // namespace ppo::PPO_ISA
