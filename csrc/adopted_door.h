// adopted_door.h -- the Python objects through which adopted kernels are called.
//
// Triton's classes get two attributes of ours (`patch_class`): `__getitem__`, also as the class's C slot, so that
// `kernel[grid]` enters C++ at once and gives an object with a vectorcall; and `run`, which whoever calls kernels
// without `[grid]` uses (Helion, torch.library.wrap_triton, Triton's own wrappers). A kernel that is not adopted goes
// on to the attributes that were there before.
#pragma once

#include <pybind11/pybind11.h>

#include <string>
#include <utility>
#include <vector>

#include "op.h"

namespace hdispatch {

/// Adds what hdispatch.adopted uses to the module.
void define_adopted(pybind11::module_& m);

/// What each adopted kernel that is alive has done, by its name. Holders of the GIL.
std::vector<std::pair<std::string, OpCounters*>> adopted_counters();

}  // namespace hdispatch
