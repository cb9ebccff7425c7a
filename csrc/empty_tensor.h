// empty_tensor.h -- new tensors on a CPU or CUDA device, as `torch.empty` and `torch.empty_strided` make them, without
// the dispatcher.
//
// For callers that know that no dispatch mode is on (`no_modes`), so that the dispatcher would find nothing to do, and
// that hold the GIL. What is kept: the device's allocator, so that streams, capture's pools, memory pools and limits
// are torch's; inference mode; filling in deterministic mode.
#pragma once

#include <Python.h>

#include <c10/core/Device.h>
#include <c10/core/ScalarType.h>
#include <c10/util/ArrayRef.h>

#include <string_view>
#include <vector>

namespace at {
class Tensor;
}

namespace hdispatch {

/// Contiguous. Throws what torch throws.
at::Tensor empty_tensor(c10::IntArrayRef sizes, c10::ScalarType type, c10::Device device);
/// The same with strides of the caller's, as many as sizes.
at::Tensor empty_tensor(c10::IntArrayRef sizes, c10::IntArrayRef strides, c10::ScalarType type, c10::Device device);

/// ns of one turn of a C loop of `count`: a call of `before` (null: none) whose result is dropped, then a stage of
/// making a tensor like `like`, and of dropping it: "nothing"; "allocator", its memory alone; "tensor", with torch's
/// tensor around it; "wrapped", with the Python object too. After a launch the pieces cost more than in a loop of their
/// own. The GIL is held. Throws kCaller where `like` is no tensor.
double bench_empty_ns(PyObject* like, std::string_view stage, uint32_t count, PyObject* before = nullptr,
                      const std::vector<PyObject*>& args = {});

}  // namespace hdispatch
