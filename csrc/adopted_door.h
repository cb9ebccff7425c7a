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

/// The adopted kernels that are alive, of Triton's and Helion's. Holders of the GIL.
std::vector<pybind11::object> adopted_objects();
/// One's name and what it has done, as long as it is held.
std::pair<const std::string*, OpCounters*> adopted_counters(const pybind11::object& adopted);

}  // namespace hdispatch
