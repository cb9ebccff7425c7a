// functional_op.h -- an op that returns tensors: they are allocated here, then written by the op that takes them.
//
//   hdispatch.ops.<op>(x)            FunctionalObject: allocates, launches, returns what it has made
//   torch.ops.hdispatch.<op>         the same in torch's dispatcher, on CPU, CUDA and Meta
//   torch.ops.hdispatch.<op>.out     OpObject's own, which takes them as its last arguments
#pragma once

#include <Python.h>

#include <string>
#include <vector>

#include "op_call.h"

namespace hdispatch {

/// How a dimension of a returned tensor follows from a call: `factor * size / divisor`, rounded up, of a dimension of
/// an argument.
struct ReturnedDim {
  int argument = -1;       ///< whose dimension `dimension` it follows; -1: it is `factor`
  uint32_t dimension = 0;  ///< as declared
  int64_t unit = 1;        ///< that dimension is so many times the symbol
  int64_t factor = 1;
  int64_t divisor = 1;
  int divisor_arg = -1;  ///< or, with divisor_arg, the value of that integer argument
};

/// A tensor that is returned, by the argument that takes it.
struct ReturnedTensor {
  std::vector<ReturnedDim> dims;
  int8_t scalar_type;  ///< as torch numbers them
  int dtype_of;        ///< or of this argument; -1: as said
  bool is_zeroed;
};

/// The Python object behind `hdispatch.ops.<op>` of such an op. Immortal, as the op.
struct FunctionalObject {
  PyObject_HEAD vectorcallfunc vectorcall;
  const OpObject* out;                   ///< takes the returned tensors too
  size_t given;                          ///< the arguments that the caller gives; those after them are returned
  std::vector<ReturnedTensor>* outputs;  ///< in the order of their arguments
  PyObject* torch_op;                    ///< torch.ops.hdispatch.<op>
  PyObject* schema;                      ///< str
};

/// Makes the Python type; once, at import. Null with a Python error set on failure.
PyObject* make_functional_type();

/// The functional form of an op, whose last arguments are returned. Registers it in torch's dispatcher, where `schema`
/// is defined already. GIL held.
FunctionalObject* make_functional(PyObject* type, const OpObject* out, const std::string& schema);

}  // namespace hdispatch
