// op_call.h -- the doors of an op: a Python object with a vectorcall slot, and the same op in torch's dispatcher.
//
//   hdispatch.ops.<op>          OpObject. Exact torch.Tensor or Parameter, no modes, no subclass: the fast path.
//   Anything
//                               else goes to the torch door.
//   torch.ops.hdispatch.<op>    one generic boxed kernel for every op, on CPU, CUDA, Meta and Autograd keys.
//
// Both fill a `Call` and end in `serve`: Runtime::dispatch and, on a miss, the op's fallback or, in strict mode, an
// error.
#pragma once

#include <Python.h>

#include <atomic>
#include <vector>

#include "runtime.h"

namespace hdispatch {

/// The Python object behind `hdispatch.ops.<op>`. Immortal: ops are never undefined.
struct OpObject {
  PyObject_HEAD vectorcallfunc vectorcall;
  const Op* op;
  PyObject* fallback;  ///< callable(*args), writes the mutated arguments
  PyObject* torch_op;  ///< torch.ops.hdispatch.<op>
};

/// In strict mode a miss raises instead of falling back. Process-wide.
extern std::atomic<bool> strict_mode;

/// Makes the Python type; once, at import. Null with a Python error set on failure.
PyObject* make_op_type();

/// Defines the op in the runtime and in torch's dispatcher and returns its new OpObject. GIL held.
OpObject* make_op(PyObject* type, const Op& op, PyObject* fallback);

/// Sets the Python error for an exception in flight; call in a catch block.
void set_python_error() noexcept;
/// Looks the exception classes of hdispatch.errors up; once, at import.
void load_error_classes();

/// All arguments of a call, positional, absent optional ones as None; borrowed references. Throws kCaller.
std::vector<PyObject*> gather_arguments(const Op& op, PyObject* const* args, size_t positional,
                                        PyObject* keyword_names);

/// Fills a Call from Python arguments; false if one of them needs the torch door. Throws kCaller for a wrong type.
bool fill_call(const Op& op, PyObject* const* args, Call& call);

}  // namespace hdispatch
