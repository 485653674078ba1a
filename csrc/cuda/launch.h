// How a kernel is launched. tests/cuda_on_cpu has its own: there, blocks run one after the other.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace ppo::cuda {

#ifdef __CUDACC__
template <class... Parameters, class... Args>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, int threads, cudaStream_t stream,
                   Args... args) {
  kernel<<<unsigned(blocks), threads, 0, stream>>>(args...);
  return cudaGetLastError();
}
#else
using on_cpu::launch;
#endif

}  // namespace ppo::cuda
