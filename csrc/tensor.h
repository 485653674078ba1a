// torch's tensors as the bindings see them, without torch's headers: through the C exchange API of
// DLPack 1.3 (dmlc/dlpack, include/dlpack/dlpack.h), which torch publishes as
// torch.Tensor.__dlpack_c_exchange_api__. A view costs tens of nanoseconds; asking Python for the
// address, the shape and the strides costs a microsecond.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>

#include "cpu/ops.h"

namespace ppo {

namespace dlpack {  // the part of the standard's binary interface that is used here

enum TypeCode : uint8_t { kInt = 0, kFloat = 2, kBfloat = 4, kBool = 6 };

struct Tensor {
  void* data;
  int32_t device_type, device_id;
  int32_t dims;
  uint8_t type_code, bits;
  uint16_t lanes;
  int64_t* shape;
  int64_t* strides;  // in elements
  uint64_t byte_offset;
};

struct ExchangeApi {
  uint32_t major, minor;
  void* previous;
  void* allocate;
  void* managed_from_object;
  void* managed_to_object;
  int (*tensor_from_object)(void* object, Tensor* view);  // borrows; 0 or a Python error
  void* current_stream;
};

inline const ExchangeApi& exchange_api() {
  static const ExchangeApi* const api = [] {
    namespace py = pybind11;
    const py::object tensor = py::module_::import("torch").attr("Tensor");
    const py::capsule capsule = tensor.attr("__dlpack_c_exchange_api__");
    const auto* found = capsule.get_pointer<ExchangeApi>();
    if (found->major != 1) throw std::runtime_error("torch's DLPack is not of version 1");
    return found;
  }();
  return *api;
}

}  // namespace dlpack

// A view of a torch tensor, valid while Python holds the tensor; of None, absent.
class Tensor {
 public:
  Tensor() = default;
  explicit Tensor(const dlpack::Tensor& view) : view_(view), present_(true) {}

  explicit operator bool() const { return present_; }
  int dims() const { return view_.dims; }
  int64_t size(int d) const { return view_.shape[d]; }
  int64_t stride(int d) const { return view_.strides[d]; }
  const int64_t* shape() const { return view_.shape; }
  const int64_t* strides() const { return view_.strides; }
  int64_t count() const {
    int64_t numbers = 1;
    for (int d = 0; d < dims(); ++d) numbers *= size(d);
    return numbers;
  }
  bool is_bool() const { return view_.type_code == dlpack::kBool; }
  bool is_index() const { return view_.type_code == dlpack::kInt && view_.bits >= 32; }
  bool is_int64() const { return is_index() && view_.bits == 64; }

  template <class T = void>
  T* data() const { return static_cast<T*>(view_.data); }

  bool is_floating() const {
    return view_.type_code == dlpack::kBfloat ||
           (view_.type_code == dlpack::kFloat && view_.bits >= 16);
  }
  DType dtype() const {  // of a floating-point tensor
    if (view_.type_code == dlpack::kBfloat) return DType::bf16;
    return view_.bits == 64 ? DType::f64 : view_.bits == 32 ? DType::f32 : DType::f16;
  }

  bool is_contiguous() const {
    int64_t next = 1;
    for (int d = dims() - 1; d >= 0; --d) {
      if (size(d) != 1 && stride(d) != next) return false;
      next *= size(d);
    }
    return true;
  }

  bool same_device(const Tensor& other) const {
    return view_.device_type == other.view_.device_type &&
           view_.device_id == other.view_.device_id;
  }
  bool same_shape(const Tensor& other) const {
    return dims() == other.dims() && std::equal(shape(), shape() + dims(), other.shape());
  }

 private:
  dlpack::Tensor view_{};
  bool present_ = false;
};

// Whether `object` is a tensor with memory that can be looked at; `tensor` is its view then.
inline bool view(pybind11::handle object, Tensor& tensor) {
  dlpack::Tensor found;
  if (dlpack::exchange_api().tensor_from_object(object.ptr(), &found) != 0) {
    PyErr_Clear();
    return false;
  }
  tensor = Tensor(found);
  return true;
}

inline Tokens tokens(const Tensor& x) {  // [B, T], or packed [N]
  if (!x) return {nullptr, 0, 0};
  return {x.data(), x.dims() == 2 ? x.stride(0) : 0, x.stride(x.dims() - 1)};
}

inline Tokens per_sequence(const Tensor& x) {  // [B]
  if (!x) return {nullptr, 0, 0};
  return {x.data(), x.stride(0), 0};
}

}  // namespace ppo

namespace pybind11::detail {

template <>
struct type_caster<ppo::Tensor> {
  PYBIND11_TYPE_CASTER(ppo::Tensor, const_name("torch.Tensor | None"));

  bool load(handle object, bool) {
    return object.is_none() || ppo::view(object, value);
  }
};

}  // namespace pybind11::detail
