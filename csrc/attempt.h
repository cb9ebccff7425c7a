// attempt.h -- serving another library's function from the table: a call of an op that says whether it was launched.
//
// An attempt takes an op's arguments and returns True where the table served them. Else nothing has run, the miss is
// counted, and whoever called runs the other library's own function. `Override` does the same for an op that torch's
// dispatcher has; an attempt is for functions that are none.
#pragma once

#include <Python.h>

#include "op.h"

namespace hdispatch {

/// A new callable, `attempt(*arguments) -> bool`. Arguments that no op takes, dispatch and function modes, tensor
/// subclasses and tensors that require grad are misses. Raises in strict mode, and for a launch that failed.
PyObject* make_attempt(const Op& op);

}  // namespace hdispatch
