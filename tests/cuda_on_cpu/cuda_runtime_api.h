// As much of CUDA as csrc/cuda uses, on a CPU, so that its kernels can be tested without a GPU:
// blocks run one after the other, the threads of a block are contexts that take turns and change
// where they meet. What that cannot show: races, and what is faster.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define PPO_CUDA_ON_CPU
#define __host__
#define __device__
#define __global__
#define __shared__ static
#define __launch_bounds__(...)

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0, cudaErrorInvalidValue = 1;
constexpr int cudaDevAttrMultiProcessorCount = 0;
struct cudaFuncAttributes {};

namespace on_cpu {

inline int processors = 4;  // pretended; tests change it to come by other ways of sharing out rows

struct Index { unsigned x; };

struct Thread {
  ucontext_t context;
  std::vector<char> stack;
  Index index;
  bool done = false;
};

// Those that meet: whoever comes last opens the way for all.
struct Meeting {
  int expected = 0, here = 0, met = 0;
};

struct Block {
  Index index, size;
  std::vector<Thread> threads;
  std::vector<Meeting> warps;
  Meeting all;
  std::vector<std::vector<char>> shuffled;  // what each thread offers
  ucontext_t scheduler;
  std::function<void()> body;
};

inline Block* block = nullptr;
inline Thread* thread = nullptr;

inline void opened(Meeting& meeting) {
  if (meeting.here == meeting.expected) {
    meeting.here = 0;
    meeting.met += 1;
  }
}

inline void meet(Meeting& meeting) {
  const int before = meeting.met;
  meeting.here += 1;
  opened(meeting);
  while (meeting.met == before) swapcontext(&thread->context, &block->scheduler);
}

inline void run_thread() {
  block->body();
  thread->done = true;
  for (Meeting* meeting : {&block->all, &block->warps[thread->index.x / 32]}) {
    meeting->expected -= 1;
    opened(*meeting);
  }
  swapcontext(&thread->context, &block->scheduler);
}

template <class T>
T exchanged(T x, int from) {  // the x of lane `from` of the same warp
  const unsigned own = thread->index.x;
  auto& mine = block->shuffled[own];
  mine.resize(sizeof(T));
  std::memcpy(mine.data(), &x, sizeof(T));
  Meeting& warp = block->warps[own / 32];
  meet(warp);
  std::memcpy(&x, block->shuffled[own / 32 * 32 + from].data(), sizeof(T));
  meet(warp);
  return x;
}

template <class... Parameters, class... Args>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, int threads, cudaStream_t,
                   Args... args) {
  for (int64_t b = 0; b < blocks; ++b) {
    Block current;
    block = &current;
    current.index.x = unsigned(b);
    current.size.x = unsigned(threads);
    current.threads.resize(threads);
    current.warps.resize((threads + 31) / 32);
    current.shuffled.resize(threads);
    current.all.expected = threads;
    current.body = [&] { kernel(args...); };
    for (int i = 0; i < threads; ++i) {
      Thread& made = current.threads[i];
      made.index.x = unsigned(i);
      made.stack.resize(1 << 15);
      current.warps[i / 32].expected += 1;
      getcontext(&made.context);
      made.context.uc_stack.ss_sp = made.stack.data();
      made.context.uc_stack.ss_size = made.stack.size();
      makecontext(&made.context, run_thread, 0);
    }
    for (bool any = true; any;) {
      any = false;
      for (Thread& next : current.threads) {
        if (next.done) continue;
        any = true;
        thread = &next;
        swapcontext(&current.scheduler, &next.context);
      }
    }
  }
  return cudaSuccess;
}

}  // namespace on_cpu

#define threadIdx (on_cpu::thread->index)
#define blockIdx (on_cpu::block->index)
#define blockDim (on_cpu::block->size)

inline void __syncthreads() { on_cpu::meet(on_cpu::block->all); }
inline void __threadfence() {}
template <class T> T __ldcg(const T* x) { return *x; }
template <class T> T __shfl_sync(unsigned, T x, int from) { return on_cpu::exchanged(x, from); }
template <class T> T __shfl_up_sync(unsigned, T x, int by) {
  const int lane = int(threadIdx.x % 32);
  return on_cpu::exchanged(x, lane < by ? lane : lane - by);
}
template <class T> T __shfl_down_sync(unsigned, T x, int by) {
  const int lane = int(threadIdx.x % 32);
  return on_cpu::exchanged(x, lane + by > 31 ? lane : lane + by);
}
template <class T> T atomicAdd(T* at, T x) { const T before = *at; *at += x; return before; }
template <class T> T atomicExch(T* at, T x) { const T before = *at; *at = x; return before; }

inline cudaError_t cudaMemsetAsync(void* at, int value, size_t bytes, cudaStream_t) {
  std::memset(at, value, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) { *device = 0; return cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* count) { *count = 1; return cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "an error"; }
inline cudaError_t cudaDeviceGetAttribute(int* value, int, int) {
  *value = on_cpu::processors;
  return cudaSuccess;
}
template <class F> cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, F*) { return cudaSuccess; }
