// The Python interface of the CPU kernels, torch-free: tensors come as views (tensor.h).
// ppo_kernels/<op>.py has checked them, and holds them until the call returns. bindings/<op>.h makes
// a kernel's arguments of them, and checks the values that memory safety depends on (cu_seqlens,
// targets, lengths). Those are headers because every file that includes pybind11 takes the compiler
// 3 s by itself; all of them together take it 7.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "bindings/adamw.h"
#include "bindings/decode_attention.h"
#include "bindings/gae.h"
#include "bindings/logprob.h"
#include "bindings/packed_linear.h"
#include "bindings/pairwise_loss.h"
#include "bindings/plain.h"
#include "bindings/ppo_loss.h"
#include "bindings/ranking_loss.h"
#include "bindings/rms_norm.h"
#include "bindings/rotary_embedding.h"
#include "bindings/sample.h"
#include "bindings/swiglu.h"
#include "cpu/isa.h"
#include "memory/torch_memory.h"

namespace py = pybind11;

PYBIND11_MODULE(_cpu, m) {
  using release_gil = py::call_guard<py::gil_scoped_release>;
  m.doc() = "CPU kernels of ppo_kernels. Private: call the ops of ppo_kernels.";
  m.def("isa", [] { return ppo::active_isa().name; }, "The instruction set in use.");
  m.def("supported_isas", [] {
    std::vector<std::string> names;
    for (const auto& isa : ppo::supported_isas()) names.push_back(isa.name);
    return names;
  }, "Those in this binary that this machine runs, best last.");
  m.def("tokens_fit", &ppo::tokens_fit);
  m.def("gae", &ppo::gae, release_gil());
  m.def("token_logprobs", &ppo::token_logprobs, release_gil());
  m.def("token_logprobs_backward", &ppo::token_logprobs_backward, release_gil());
  m.def("ppo_policy_loss", &ppo::ppo_policy_loss, release_gil());
  m.def("ppo_value_loss", &ppo::ppo_value_loss, release_gil());
  m.def("pairwise_loss", &ppo::pairwise_loss, release_gil());
  m.def("ranking_loss", &ppo::ranking_loss, release_gil());
  m.def("sample", &ppo::sample, release_gil());
  m.def("decode_attention", &ppo::decode_attention, release_gil());
  m.def("adamw", &ppo::adamw, release_gil());
  m.def("rms_norm", &ppo::rms_norm, release_gil());
  m.def("rms_norm_backward", &ppo::rms_norm_backward, release_gil());
  m.def("rotary_fits", &ppo::rotary_fits);
  m.def("rotary_embedding", &ppo::rotary_embedding, release_gil());
  m.def("swiglu", &ppo::swiglu, release_gil());
  m.def("swiglu_backward", &ppo::swiglu_backward, release_gil());
  m.attr("panel") = ppo::kPanel;
  m.def("multiplies_bf16", &ppo::multiplies_bf16);
  m.def("pack_weight", &ppo::pack_weight, release_gil());
  m.def("packed_linear", &ppo::packed_linear, release_gil());
  m.def("keep_large_tensors", &ppo::keep_large_tensors);
  m.def("is_in_heap", &ppo::is_in_heap);
  m.def("release_large_tensors", &ppo::release_large_tensors, release_gil());
}
