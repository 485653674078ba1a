// The CUDA kernels and their bindings as the module `_cuda_on_cpu`; see cuda_runtime_api.h.
#define _cuda _cuda_on_cpu
#include "../../csrc/cuda/gae.cu"
#include "../../csrc/cuda/bindings.cpp"
