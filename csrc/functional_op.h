// functional_op.h -- an op that returns tensors: they are allocated here, then written by the op that takes them.
//
//   hdispatch.ops.<op>(x)            FunctionalObject: allocates, calls OpObject with all arguments, returns what it
//   made torch.ops.hdispatch.<op>         the same in torch's dispatcher, on CPU, CUDA and Meta
//   torch.ops.hdispatch.<op>.out     OpObject's own, which takes them as its last arguments
#pragma once

#include <Python.h>

#include <string>

#include "op_call.h"

namespace hdispatch {

/// The Python object behind `hdispatch.ops.<op>` of such an op. Immortal, as the op.
struct FunctionalObject {
  PyObject_HEAD vectorcallfunc vectorcall;
  const OpObject* out;  ///< takes the returned tensors too
  size_t given;         ///< the arguments that the caller gives; those after them are returned
  PyObject* torch_op;   ///< torch.ops.hdispatch.<op>
  PyObject* schema;     ///< str
};

/// Makes the Python type; once, at import. Null with a Python error set on failure.
PyObject* make_functional_type();

/// The functional form of an op, whose last arguments are returned. Registers it in torch's dispatcher, where `schema`
/// is defined already. GIL held.
FunctionalObject* make_functional(PyObject* type, const OpObject* out, const std::string& schema);

}  // namespace hdispatch
