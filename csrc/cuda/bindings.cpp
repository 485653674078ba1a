// The Python interface of the CUDA kernels, torch-free, as ../bindings.cpp is that of the CPU's.
// ppo_kernels/<op>.py has checked the tensors, and holds them until they are used up.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "../tensor.h"
#include "gae.h"

namespace py = pybind11;

namespace ppo::cuda {
namespace {

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

int processors() {
  int device = 0, count = 0;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

// Empty, or why the kernels cannot run on the current device.
std::string why_not() {
  int devices = 0;
  cudaError_t error = cudaGetDeviceCount(&devices);
  if (error == cudaSuccess) error = can_run();
  if (error == cudaSuccess) return "";
  cudaGetLastError();  // forgotten, so that no later call reports it
  return cudaGetErrorString(error);
}

// On the current device, which is the tensors'. `empty` makes room: empty(bytes) is a tensor there.
void call_gae(const Tensor& mask, const Tensor& cu_seqlens, const Tensor& values,
              const Tensor& bootstrap, const Tensor& rewards, const Tensor& scores,
              const Tensor& logprobs, const Tensor& ref_logprobs, int kl_estimator,
              double kl_coef, const Tensor& kl_coef_on_device, double gamma, double lam,
              const Tensor& advantages, const Tensor& returns, const Tensor& kl,
              const Tensor& moments, uintptr_t stream, const py::function& empty) {
  GaeArgs args{};
  args.dtype = values.dtype();
  if (cu_seqlens) {
    args.rows = {cu_seqlens.size(0) - 1, values.size(0), cu_seqlens.data<const int64_t>()};
  } else {
    args.rows = {values.size(0), values.size(1), nullptr};
  }
  args.mask = tokens(mask);
  args.values = tokens(values);
  args.bootstrap = per_sequence(bootstrap);
  args.rewards = tokens(rewards);
  args.scores = per_sequence(scores);
  args.logprobs = tokens(logprobs);
  args.ref_logprobs = tokens(ref_logprobs);
  args.kl_estimator = KL(kl_estimator);
  args.kl_coef = kl_coef;
  if (kl_coef_on_device) {
    args.kl_coef_on_device = kl_coef_on_device.data();
    args.kl_coef_dtype = kl_coef_on_device.dtype();
  }
  args.gamma = gamma;
  args.gamma_lam = gamma * lam;
  args.advantages = tokens(advantages);
  args.returns = tokens(returns);
  args.kl = kl.data();
  args.moments = moments.data();
  const GaePlan plan = plan_gae(args, processors());
  py::object room;
  Tensor workspace;
  if (plan.workspace_bytes > 0) {
    room = empty(plan.workspace_bytes);
    if (!view(room, workspace)) throw std::runtime_error("no memory for a workspace");
  }
  check(cuda::gae(args, plan, workspace.data(), reinterpret_cast<cudaStream_t>(stream)));
}

}  // namespace
}  // namespace ppo::cuda

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of ppo_kernels. Private: call the ops of ppo_kernels.";
#ifdef PPO_CUDA_ON_CPU  // tests/cuda_on_cpu
  m.attr("device_type") = "cpu";
  m.def("pretend_processors", [](int count) { on_cpu::processors = count; });
#else
  m.attr("device_type") = "cuda";
#endif
  m.def("why_not", &ppo::cuda::why_not, "Empty, or why the kernels cannot run on the current device.");
  m.def("gae", &ppo::cuda::call_gae);
}
