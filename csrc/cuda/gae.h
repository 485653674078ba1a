// What crosses between the bindings and the kernels: plain data. See cpu/ops.h for its parts.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "../cpu/ops.h"

namespace ppo::cuda {

// gae (kl_estimator none, rewards given) and kl_shaped_gae (rewards made of the other tensors). The
// last dimension of every tensor of tokens is contiguous. Outputs are in the accumulation dtype.
struct GaeArgs {
  DType dtype;  // of every input but kl_coef's
  Rows rows;
  Tokens mask;  // bool
  Tokens values, bootstrap;
  Tokens rewards;
  Tokens scores, logprobs, ref_logprobs;
  KL kl_estimator;
  double kl_coef;
  const void* kl_coef_on_device;  // or null
  DType kl_coef_dtype;
  double gamma, gamma_lam;
  Tokens advantages, returns;  // out
  void* kl;                    // out, [B], or null
  void* moments;               // out, [3], or null
};

// How the rows are shared out among blocks of threads, for one GPU.
struct GaePlan {
  int warps;           // that take the tiles of a row together; of 1, each warp of a block has a row
  bool in_chunks;      // of one tile each, as there are too few rows to fill the GPU
  int64_t chunks;      // of a row, at most
  int64_t blocks;
  size_t zeroed_bytes;     // of the workspace, at its beginning
  size_t workspace_bytes;  // 0 where none is needed
};

GaePlan plan_gae(const GaeArgs& args, int processors);

// `workspace`: of plan.workspace_bytes, aligned to 16. Does not wait for the GPU.
cudaError_t gae(const GaeArgs& args, const GaePlan& plan, void* workspace, cudaStream_t stream);

// Whether the current device can run these kernels.
cudaError_t can_run();

}  // namespace ppo::cuda
