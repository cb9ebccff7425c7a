// torch_values.h -- Python objects as the values of torch's dispatcher and back, declared here.
//
// torch declares both in pybind_utils.h, which takes 26 s to compile; this takes 7.
#pragma once

#include <ATen/core/ivalue.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/Export.h>

namespace torch::jit {

/// A Python object as a value of a type; `count` is how many a list of fixed length has. Throws what torch throws.
TORCH_PYTHON_API c10::IValue toIValue(pybind11::handle object, const c10::TypePtr& type, std::optional<int32_t> count);

/// A value as a Python object. GIL held.
TORCH_PYTHON_API pybind11::object toPyObject(c10::IValue value);

}  // namespace torch::jit
