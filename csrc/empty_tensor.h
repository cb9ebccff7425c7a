// empty_tensor.h -- new tensors on a CPU or CUDA device, as `torch.empty` and `torch.empty_strided` make them, without
// the dispatcher.
//
// For callers that know that no dispatch mode is on (`no_modes`), so that the dispatcher would find nothing to do, and
// that hold the GIL. What is kept: the device's allocator, so that streams, capture's pools, memory pools and limits
// are torch's; inference mode; filling in deterministic mode.
#pragma once

#include <Python.h>

#include <ATen/core/Tensor.h>

#include <string_view>

namespace hdispatch {

/// Contiguous. Throws what torch throws.
at::Tensor empty_tensor(c10::IntArrayRef sizes, c10::ScalarType type, c10::Device device);
/// The same with strides of the caller's, as many as sizes.
at::Tensor empty_tensor(c10::IntArrayRef sizes, c10::IntArrayRef strides, c10::ScalarType type, c10::Device device);

/// ns that a stage of making a tensor like `like` takes, and of dropping it, of a C loop of `count`: "allocator", its
/// memory alone; "tensor", with torch's tensor around it; "wrapped", with the Python object too. The GIL is held.
/// Throws kCaller where `like` is no tensor.
double bench_empty_ns(PyObject* like, std::string_view stage, uint32_t count);

}  // namespace hdispatch
