// What the checks in Python leave out, where one look at the tensors shows that they are right.
#pragma once

#include "../tensor.h"

namespace py = pybind11;

namespace ppo {
namespace {

// Whether `x` is a torch.Tensor or a Parameter itself, with memory; `found` is its view then.
bool is_plain(py::handle x, Tensor& found) {
  static const py::handle torch = py::module_::import("torch").release();
  static const py::handle tensor_type = py::object(torch.attr("Tensor")).release();
  static const py::handle parameter_type = py::object(torch.attr("nn").attr("Parameter")).release();
  const py::handle type = py::type::handle_of(x);
  return (type.is(tensor_type) || type.is(parameter_type)) && view(x, found);
}

// Whether these per-token tensors need no closer look: torch.Tensor or Parameter themselves, of
// floating point, of one shape, [B, T] or [N], and on one device, with a mask and boundaries that
// fit. False says nothing: ppo_kernels/checks.py looks closer then.
bool tokens_fit(py::handle mask, py::handle cu_seqlens, bool needs_sequences,
                const py::args& tensors) {
  Tensor first, x;
  for (const py::handle object : tensors) {
    if (object.is_none()) continue;
    if (!is_plain(object, x) || !x.is_floating()) return false;
    if (!first) {
      first = x;
      const bool packed = first.dims() == 1 && (!cu_seqlens.is_none() || !needs_sequences);
      if (!packed && (first.dims() != 2 || !cu_seqlens.is_none())) return false;
    } else if (!x.same_shape(first) || !x.same_device(first)) {
      return false;
    }
  }
  if (!first) return false;
  if (!mask.is_none() && !(is_plain(mask, x) && x.is_bool() && x.same_shape(first) &&
                           x.same_device(first))) {
    return false;
  }
  return cu_seqlens.is_none() || (is_plain(cu_seqlens, x) && x.is_index() && x.dims() == 1 &&
                                  x.size(0) >= 1 && x.same_device(first));
}

}  // namespace
}  // namespace ppo
