// op_arguments.h -- the arguments of a Python call in the op's order.
#pragma once

#include <Python.h>

#include <cstddef>
#include <vector>

#include "op.h"

namespace hdispatch {

/// All arguments of a call, positional, absent optional ones as None; borrowed references. Throws kCaller.
std::vector<PyObject*> gather_arguments(const Op& op, PyObject* const* args, size_t positional,
                                        PyObject* keyword_names);

/// What an argument is where it is left out, borrowed; null if it must be given.
PyObject* default_argument(const ArgSpec& arg);

}  // namespace hdispatch
