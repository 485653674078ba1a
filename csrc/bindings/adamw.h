// The call of adamw: the pieces that its threads take.
#pragma once

#include <algorithm>
#include <vector>

#include "arguments.h"

namespace ppo {
namespace {

using Tensors = std::vector<Tensor>;

// As many contiguous tensors of each kind, of one dtype for each; without remainders of float32,
// and without scales of moments in float32.
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
    const int64_t count = weights[i].count();
    tensors.push_back({weights[i].data(),
                       remainder.empty() ? nullptr : remainder[i].data<uint16_t>(),
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

}  // namespace
}  // namespace ppo
