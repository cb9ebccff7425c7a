// strict_mode.h -- whether a miss raises instead of falling back: for the process, or for the caller's context.
#pragma once

#include <Python.h>

#include <atomic>
#include <cstdint>

namespace hdispatch {

/// In strict mode a miss raises instead of falling back. `on` is the process's mode; while any thread is in a block of
/// its own, `query` is asked, a Python callable that says what holds for the caller's context.
struct StrictMode {
  std::atomic<bool> on{false};
  std::atomic<int64_t> blocks{0};
  PyObject* query = nullptr;  ///< set once, at import

  /// Whether a miss raises here. Takes the GIL where blocks are open.
  bool holds() const;
};
extern StrictMode strict_mode;

}  // namespace hdispatch
