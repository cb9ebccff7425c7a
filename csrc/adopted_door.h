// adopted_door.h -- what the Python module has of adopted kernels: making one, switching it, its keys and counters.
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
