// Generalized advantage estimation (Schulman et al. 2016, arXiv:1506.02438), with given rewards or
// with KL-shaped ones (Ouyang et al. 2022), in one launch:
//
//   A_t = r_t - V_t + c_{t+1},   c_t = gamma V_t + gamma lam A_t
//
// All that a token needs from its right is the carry c, which at the end of a sequence is
// gamma bootstrap + score. What tokens do to it is an affine function, and these compose (scan.h):
// a thread takes a group of adjacent tokens, which it reads 16 bytes at once, a warp scans over
// its lanes by shuffles, and the warps of a row over what each of them does. In double for every
// dtype, so that the rounding errors of a long sequence do not accumulate.
//
// Many rows: one or several warps walk through the tiles of a row, from its end. Few long rows: each
// tile is a chunk of its own. It says what it does to a carry, waits until all chunks to its right
// have said so too, and takes these together, in their order: results do not depend on which chunk
// came first. Chunks are numbered from the right; that blocks begin in the order of their numbers,
// so that what a chunk waits for has begun, is not promised by CUDA, but it is what GPUs do, and what
// NVIDIA's own scan (CUB) relies on. The last block of all merges the moments, in a fixed order too.
#include "gae.h"

#include <algorithm>

#include "launch.h"
#include "scan.h"
#include "tokens.h"

namespace ppo::cuda {
namespace {

constexpr int kWarp = 32, kWarps = 8, kThreads = kWarps * kWarp;
// Blocks on a multiprocessor, at least: what the registers are to suffice for.
constexpr int kBlocks = 2;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kBlocksOfChunks = 1;  // with 2, the compiler spills some there
#else
constexpr int kBlocksOfChunks = 2;
#endif
constexpr unsigned kAll = 0xffffffff;

// What the workspace begins with, and what follows it.
struct alignas(16) Counters { unsigned done; };  // blocks
struct Partial { Sums sums; double kl; };

struct Workspace {
  Counters* counters;
  unsigned* said;     // [blocks], in chunks: whether that one has
  Affine* summaries;  // [blocks], in chunks: what it does to a carry
  Partial* partials;  // [blocks]
};

__host__ __device__ size_t rounded_up(size_t bytes) { return (bytes + 15) / 16 * 16; }

__host__ __device__ size_t zeroed_bytes(bool in_chunks, int64_t blocks) {
  return rounded_up(sizeof(Counters) + (in_chunks ? size_t(blocks) * sizeof(unsigned) : 0));
}

__device__ Workspace parts_of(char* workspace, bool in_chunks, int64_t blocks) {
  Workspace parts;
  parts.counters = reinterpret_cast<Counters*>(workspace);
  parts.said = reinterpret_cast<unsigned*>(workspace + sizeof(Counters));
  workspace += zeroed_bytes(in_chunks, blocks);
  parts.summaries = reinterpret_cast<Affine*>(workspace);
  if (in_chunks) workspace += size_t(blocks) * sizeof(Affine);
  parts.partials = reinterpret_cast<Partial*>(workspace);
  return parts;
}

// --- What a thread takes -------------------------------------------------------------------------

// Tokens of a thread: of long rows more, so that all chunks of some are under way at once.
template <class T, bool kInChunks>
constexpr int kGroup = sizeof(Accumulator<T>) == 8 ? 4 : kInChunks ? 16 : 8;

// Keeps the compiler from keeping what it made of x, which takes more registers than x.
__device__ void forget(float& x) {
#ifdef __CUDA_ARCH__
  asm volatile("" : "+f"(x));
#endif
}
__device__ void forget(double& x) {
#ifdef __CUDA_ARCH__
  asm volatile("" : "+d"(x));
#endif
}

// k2 or k3 (Schulman 2020, joschu.net/blog/kl-approx.html); k3 with the log-ratio clamped as in the loss.
template <class A>
__device__ A other_estimate(A log_ratio, KL estimator) {
  if (estimator == KL::k2) return log_ratio * log_ratio / 2;
  A bounded = log_ratio < A(-20) ? A(-20) : log_ratio;
  bounded = bounded > A(20) ? A(20) : bounded;
  return A(expm1(-bounded)) + bounded;
}

template <class T>
__device__ double number_at(const void* x) { return double(widen(*static_cast<const T*>(x))); }

__device__ double kl_coefficient(const GaeArgs& args) {
  if (args.kl_coef_on_device == nullptr) return args.kl_coef;
  switch (args.kl_coef_dtype) {
    case DType::f32: return number_at<float>(args.kl_coef_on_device);
    case DType::f64: return number_at<double>(args.kl_coef_on_device);
    case DType::bf16: return number_at<bf16>(args.kl_coef_on_device);
    case DType::f16: return number_at<f16>(args.kl_coef_on_device);
  }
  return 0;
}

// --- Warps ---------------------------------------------------------------------------------------

__device__ Affine shuffled_up(Affine x, int by) {
  return {__shfl_up_sync(kAll, x.a, by), __shfl_up_sync(kAll, x.u, by)};
}

// Of each lane, what the lanes up to it do together; lane 0 is at the right.
__device__ Affine scanned(Affine x, int lane) {
#pragma unroll
  for (int by = 1; by < kWarp; by *= 2) {
    const Affine right = shuffled_up(x, by);
    if (lane >= by) x = then(right, x);
  }
  return x;
}

__device__ Affine of_last_lane(Affine x) {
  return {__shfl_sync(kAll, x.a, kWarp - 1), __shfl_sync(kAll, x.u, kWarp - 1)};
}

// In lane 0, of all lanes.
__device__ double summed_over_lanes(double x) {
#pragma unroll
  for (int by = kWarp / 2; by > 0; by /= 2) x += __shfl_down_sync(kAll, x, by);
  return x;
}

// Of all warps; each lane 0 brings its own.
__device__ double summed_over_warps(double x, double* shared) {
  const int warps = blockDim.x / kWarp;
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = x;
  __syncthreads();
  x = 0;
  for (int w = 0; w < warps; ++w) x += shared[w];
  return x;
}

// In lane 0, of all lanes.
__device__ Partial merged_over_lanes(Partial x) {
#pragma unroll
  for (int by = kWarp / 2; by > 0; by /= 2) {
    const Sums other = {__shfl_down_sync(kAll, x.sums.count, by),
                        __shfl_down_sync(kAll, x.sums.origin, by),
                        __shfl_down_sync(kAll, x.sums.sum, by),
                        __shfl_down_sync(kAll, x.sums.squares, by)};
    x.sums = merged(x.sums, other);
  }
  x.kl = summed_over_lanes(x.kl);
  return x;
}

// Of all warps; each lane 0 brings its own.
__device__ Partial merged_over_warps(Partial x, Partial* shared) {
  const int warps = blockDim.x / kWarp;
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = x;
  __syncthreads();
  x = shared[0];
#pragma unroll 1
  for (int w = 1; w < warps; ++w) {
    x.sums = merged(x.sums, shared[w].sums);
    x.kl += shared[w].kl;
  }
  return x;
}

// --- Chunks ----------------------------------------------------------------------------------

// What the chunks to the right of this one do together, in every lane of the calling warp.
__device__ Affine said_by_those_at_the_right(const Workspace& workspace, int64_t row, int64_t rows,
                                             int64_t chunk, int lane) {
  Affine all = identity();
  for (int64_t from = 0; from < chunk; from += kWarp) {
    const int64_t at = (from + lane) * rows + row;
    Affine f = identity();
    if (from + lane < chunk) {
      while (*static_cast<volatile unsigned*>(&workspace.said[at]) == 0) {
      }
      __threadfence();
      f = {__ldcg(&workspace.summaries[at].a), __ldcg(&workspace.summaries[at].u)};
    }
    all = then(all, of_last_lane(scanned(f, lane)));
  }
  return all;
}

// The last block: moments from those of all blocks and, in chunks, each row's KL sum.
template <class A>
__device__ void finish(const GaeArgs& args, const GaePlan& plan, const Workspace& workspace,
                       Partial* shared) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  Partial all{};
#pragma unroll 1
  for (int64_t i = threadIdx.x; i < plan.blocks; i += blockDim.x) {
    const Sums& x = workspace.partials[i].sums;
    all.sums = merged(
        all.sums, {__ldcg(&x.count), __ldcg(&x.origin), __ldcg(&x.sum), __ldcg(&x.squares)});
  }
  all = merged_over_warps(merged_over_lanes(all), shared);
  if (threadIdx.x == 0) {
    const Moments found = moments_of(all.sums);
    A* moments = static_cast<A*>(args.moments);
    moments[0] = A(found.count);
    moments[1] = A(found.mean);
    moments[2] = A(found.m2);
  }
  if (!plan.in_chunks) return;
  for (int64_t b = warp; b < args.rows.count; b += warps) {
    double kl = 0;
    for (int64_t c = lane; c < plan.chunks; c += kWarp) {
      kl += __ldcg(&workspace.partials[c * args.rows.count + b].kl);
    }
    kl = summed_over_lanes(kl);
    if (lane == 0) static_cast<A*>(args.kl)[b] = A(kl);
  }
}

// --- The kernel ----------------------------------------------------------------------------------

template <class T>
__device__ double at_end(const GaeArgs& args, int64_t b) {
  double carry = 0;
  if (args.bootstrap.data != nullptr) {
    carry = args.gamma * double(widen(row_of<const T>(args.bootstrap, b, 0)[0]));
  }
  if (args.scores.data != nullptr) carry += double(widen(row_of<const T>(args.scores, b, 0)[0]));
  return carry;
}

template <class T, bool kShaped, bool kInChunks>
__global__ void __launch_bounds__(kThreads, kInChunks ? kBlocksOfChunks : kBlocks)
    gae_kernel(GaeArgs args, GaePlan plan, char* memory) {
  using A = Accumulator<T>;
  constexpr int kCount = kGroup<T, kInChunks>;
  __shared__ Affine totals[2][kWarps];
  __shared__ Partial partials[kWarps];
  __shared__ double carry_of_chunk, kl_of_warps[kWarps];
  __shared__ unsigned done_before;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const bool alone = !kInChunks && plan.warps == 1;  // a row for each warp
  const int64_t piece = blockIdx.x;
  const Discounts discounts(args.gamma, args.gamma_lam, kShaped ? -kl_coefficient(args) : 1);
  const int threads = plan.warps * kWarp, thread = alone ? lane : int(threadIdx.x);
  A* const kl_sums = static_cast<A*>(args.kl);
  Sums sums{};
  double kl = 0;

  // Only where each warp has a row are there several to a block, one after the other.
  const int64_t step = plan.blocks * (alone ? kWarps : 1);
  for (int64_t b = kInChunks ? piece % args.rows.count : alone ? piece * kWarps + warp : piece;
       b < args.rows.count; b += step) {
    const Sequence<T, kCount> s(args, b);
    const int64_t chunk = kInChunks ? piece / args.rows.count : 0;
    const int64_t tiles = (s.groups + threads - 1) / threads;
    const int64_t end = kInChunks && chunk + 1 < tiles ? chunk + 1 : tiles;
    double carry = kInChunks ? 0 : at_end<T>(args, b);  // at the right of the tile
    for (int64_t tile = chunk; tile < end; ++tile) {
      const int64_t group = s.groups - 1 - tile * threads - thread;
      const Inputs<T, kCount> in(s, group);
      A x[kCount], value[kCount];  // rewards, or KL estimates; 0 of masked tokens
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const A given = A(widen(in.given.x[i]));
        x[i] = kShaped ? given - A(widen(in.ref_logprobs.x[i])) : given;
        if (!in.is_real(i)) x[i] = 0;
        value[i] = in.is_real(i) ? A(widen(in.values.x[i])) : A(0);
      }
      if (kShaped) {
        if (args.kl_estimator != KL::k1) {
#pragma unroll
          for (int i = 0; i < kCount; ++i) x[i] = other_estimate(x[i], args.kl_estimator);
        }
        A sum = 0;
#pragma unroll
        for (int i = 0; i < kCount; ++i) sum += x[i];
        kl += double(sum);
      }
      Affine own = identity();
#pragma unroll
      for (int i = kCount - 1; i >= 0; --i) {
        own = then(own, discounts.token(in.is_real(i), double(x[i]), double(value[i])));
      }

#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        forget(x[i]);
        forget(value[i]);
      }

      const Affine up_to = scanned(own, lane);
      Affine right = shuffled_up(up_to, 1);
      if (lane == 0) right = identity();
      double at_right;  // of this thread's tokens
      if (alone) {
        at_right = apply(right, carry);
        carry = apply(of_last_lane(up_to), carry);
      } else {
        Affine* const total = totals[tile % 2];
        if (lane == kWarp - 1) total[warp] = up_to;
        __syncthreads();
        if (kInChunks) {
          const Workspace workspace = parts_of(memory, kInChunks, plan.blocks);
          if (threadIdx.x == 0) {
            Affine all = total[0];
#pragma unroll 1
            for (int w = 1; w < plan.warps; ++w) all = then(all, total[w]);
            workspace.summaries[piece] = all;
            __threadfence();
            atomicExch(&workspace.said[piece], 1u);
          }
          if (warp == 0) {
            const Affine f =
                said_by_those_at_the_right(workspace, b, args.rows.count, chunk, lane);
            if (lane == 0) carry_of_chunk = apply(f, at_end<T>(args, b));
          }
          __syncthreads();
          carry = carry_of_chunk;
        }
        double at_warp = carry;
#pragma unroll 1
        for (int w = 0; w < plan.warps; ++w) {
          if (w == warp) at_warp = carry;
          carry = apply(total[w], carry);
        }
        at_right = apply(right, at_warp);
      }

      int count = 0;
      A origin = A(sums.origin), sum = 0, squares = 0;
      Group<A, kCount> advantages, returns;
#pragma unroll
      for (int i = kCount - 1; i >= 0; --i) {
        const bool real = in.is_real(i);
        const double v = double(value[i]);
        const double advantage = advantage_of(discounts.token(real, double(x[i]), v), at_right);
        advantages.x[i] = real ? A(advantage) : A(0);
        returns.x[i] = real ? A(advantage + v) : A(0);
        if (kShaped && real) {
          if (count == 0 && sums.count == 0) origin = advantages.x[i];
          count += 1;
          const A d = advantages.x[i] - origin;
          sum += d;
          squares += d * d;
        }
      }
      if (in.whole) {  // together: half a sector of memory written alone has to be read first
        *reinterpret_cast<Group<A, kCount>*>(s.advantages + in.first) = advantages;
        *reinterpret_cast<Group<A, kCount>*>(s.returns + in.first) = returns;
      } else {
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          const int64_t t = in.first + i;
          if (group < 0 || t < 0 || t >= s.length) continue;
          s.advantages[t] = advantages.x[i];
          s.returns[t] = returns.x[i];
        }
      }
      if (kShaped) {
        sums.origin = double(origin);
        sums.count += count;
        sums.sum += double(sum);
        sums.squares += double(squares);
      }
      if (kInChunks) break;
    }
    if (kInChunks) break;
    if (kShaped) {
      kl = summed_over_lanes(kl);
      if (!alone) kl = summed_over_warps(kl, kl_of_warps);
      if (thread == 0) kl_sums[b] = A(kl);
      kl = 0;
    }
  }
  if (!kShaped) return;

  const Workspace workspace = parts_of(memory, kInChunks, plan.blocks);
  const Partial own = merged_over_warps(merged_over_lanes({sums, kl}), partials);
  if (threadIdx.x == 0) {
    workspace.partials[piece] = own;
    __threadfence();
    done_before = atomicAdd(&workspace.counters->done, 1u);
    __threadfence();
  }
  __syncthreads();
  if (done_before == plan.blocks - 1) finish<A>(args, plan, workspace, partials);
}

template <class T>
cudaError_t launch_gae(const GaeArgs& args, const GaePlan& plan, void* workspace,
                       cudaStream_t stream) {
  const bool shaped = args.kl_estimator != KL::none;
  const auto kernel =
      shaped ? (plan.in_chunks ? gae_kernel<T, true, true> : gae_kernel<T, true, false>)
             : (plan.in_chunks ? gae_kernel<T, false, true> : gae_kernel<T, false, false>);
  const int threads = plan.warps == 1 ? kThreads : plan.warps * kWarp;
  return launch(kernel, plan.blocks, threads, stream, args, plan, static_cast<char*>(workspace));
}

}  // namespace

cudaError_t can_run() {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, gae_kernel<float, true, false>);
}

cudaError_t gae(const GaeArgs& args, const GaePlan& plan, void* workspace, cudaStream_t stream) {
  if (plan.zeroed_bytes > 0) {
    const cudaError_t error = cudaMemsetAsync(workspace, 0, plan.zeroed_bytes, stream);
    if (error != cudaSuccess) return error;
  }
  if (plan.blocks == 0) {  // no tokens: all zero
    const size_t size = args.dtype == DType::f64 ? sizeof(double) : sizeof(float);
    return args.moments == nullptr ? cudaSuccess
                                   : cudaMemsetAsync(args.moments, 0, 3 * size, stream);
  }
  switch (args.dtype) {
    case DType::f32: return launch_gae<float>(args, plan, workspace, stream);
    case DType::f64: return launch_gae<double>(args, plan, workspace, stream);
    case DType::bf16: return launch_gae<bf16>(args, plan, workspace, stream);
    case DType::f16: return launch_gae<f16>(args, plan, workspace, stream);
  }
  return cudaErrorInvalidValue;
}

GaePlan plan_gae(const GaeArgs& args, int processors) {
  const int64_t rows = args.rows.count, longest = args.rows.length;
  const bool doubles = args.dtype == DType::f64;
  const int64_t group = doubles ? kGroup<double, false> : kGroup<float, false>;
  const int64_t group_of_chunk = doubles ? kGroup<double, true> : kGroup<float, true>;
  const int64_t chunk = kThreads * group_of_chunk;
  // Of packed rows only the sum of their lengths is known here: each might have all of it.
  const int64_t few = args.rows.cu_seqlens != nullptr ? 8 : processors;
  GaePlan plan{};
  plan.in_chunks = rows <= few && longest > 2 * chunk;
  if (plan.in_chunks) {
    plan.warps = kWarps;
    // A row may begin within a group.
    plan.chunks = (longest + group_of_chunk - 1 + chunk - 1) / chunk;
    plan.blocks = rows * plan.chunks;
  } else {
    // As few warps for a row as still fill the GPU, and not more than there are tokens for.
    const int64_t side_by_side = processors * int64_t(kBlocks * kWarps);  // warps
    plan.warps = 1;
    while (plan.warps < kWarps && rows * plan.warps * 2 <= side_by_side &&
           plan.warps * kWarp * group < longest) {
      plan.warps *= 2;
    }
    plan.blocks = plan.warps == 1 ? std::min((rows + kWarps - 1) / kWarps, side_by_side / kWarps)
                                  : rows;
  }
  const bool shaped = args.kl_estimator != KL::none;
  if (shaped || plan.in_chunks) {
    plan.zeroed_bytes = zeroed_bytes(plan.in_chunks, plan.blocks);
    plan.workspace_bytes = plan.zeroed_bytes +
                           (plan.in_chunks ? size_t(plan.blocks) * sizeof(Affine) : 0) +
                           (shaped ? size_t(plan.blocks) * sizeof(Partial) : 0);
  }
  return plan;
}

}  // namespace ppo::cuda
