// adopted_patch.h -- attributes of ours on classes of Triton's and Helion's, which lead their calls to adopted kernels.
//
// A class gets `__getitem__` and `run` (Triton's kernels) or `__call__` (Helion's), each also as the class's C slot, so
// that `kernel[grid]` enters C++ at once and gives an object with a vectorcall. A kernel that is not adopted goes on to
// the attributes that were there before.
#pragma once

#include <pybind11/pybind11.h>

namespace hdispatch {

void make_patch_types();

/// Puts our attributes on a class of Triton kernels. `adopt`: callable(kernel) for kernels that are not adopted yet, or
/// None: they stay Triton's. Again: only sets `adopt`.
void patch_class(const pybind11::object& type, const pybind11::object& adopt);
/// Takes our attributes off again; false if somebody has put others over them, which then stay and lead to ours.
bool unpatch_class(const pybind11::object& type);

/// The same for a class of host kernels, which are called.
void patch_host_class(const pybind11::object& type);
void unpatch_host_class(const pybind11::object& type);

/// The `run` (or `__call__`) of a kernel's class before it was patched, borrowed; null if it was not.
PyObject* patched_run(PyObject* kernel);

}  // namespace hdispatch
