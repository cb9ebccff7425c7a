// strict_mode.cpp -- asking Python what holds where a block is open.
#include "strict_mode.h"

#include <pybind11/pybind11.h>

namespace hdispatch {

StrictMode strict_mode;

bool StrictMode::holds() const {
  // No GIL where no block is open: the torch door's callers hold none.
  if (!blocks.load(std::memory_order_relaxed)) return on.load(std::memory_order_relaxed);
  const pybind11::gil_scoped_acquire gil;
  return pybind11::handle(query)().cast<bool>();
}

}  // namespace hdispatch
