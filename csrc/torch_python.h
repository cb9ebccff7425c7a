// torch_python.h -- what we use of torch's Python objects, declared here.
//
// torch declares it in python_variable.h, which takes 14 s to compile; this takes 4. The linker holds the functions to
// torch's, and torch_layout.h the layout of a tensor's object.
#pragma once

#include <ATen/core/Tensor.h>
#include <Python.h>
#include <torch/csrc/Export.h>

#include "python_errors.h"

TORCH_PYTHON_API extern PyObject* THPVariableClass;
TORCH_PYTHON_API extern PyObject* ParameterClass;
TORCH_PYTHON_API PyObject* THPVariable_Wrap(at::TensorBase&& tensor);
TORCH_PYTHON_API PyObject* THPVariable_Wrap(const at::TensorBase& tensor);

namespace hdispatch {

/// How torch's Python object of a tensor begins: its THPVariable, the same in 2.11, 2.13 and 2.14.
struct TensorObject {
  PyObject_HEAD at::Tensor tensor;
};

/// The tensor of an object that `is_tensor_object`.
inline const at::Tensor& tensor_of(PyObject* object) { return reinterpret_cast<const TensorObject*>(object)->tensor; }

/// Whether a type is Tensor or Parameter itself: a subclass may mean something else by what it holds.
inline bool is_exact_tensor_type(PyTypeObject* type) noexcept {
  return type == reinterpret_cast<PyTypeObject*>(THPVariableClass) ||
         type == reinterpret_cast<PyTypeObject*>(ParameterClass);
}

/// Whether an object is a tensor, of a subclass too.
inline bool is_tensor_object(PyObject* object) {
  if (is_exact_tensor_type(Py_TYPE(object))) return true;
  const int is_one = PyObject_IsInstance(object, THPVariableClass);
  if (is_one < 0) throw_python_error();
  return is_one;
}

/// A new reference to a tensor's object; null with Python's error set if there can be none.
inline PyObject* wrap_tensor(at::TensorBase&& tensor) { return THPVariable_Wrap(std::move(tensor)); }
inline PyObject* wrap_tensor(const at::TensorBase& tensor) { return THPVariable_Wrap(tensor); }

}  // namespace hdispatch
