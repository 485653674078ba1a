// The call of gae: the pieces that its threads take, and the moments of what they find.
#pragma once

#include <vector>

#include "arguments.h"

namespace ppo {
namespace {

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

}  // namespace
}  // namespace ppo
