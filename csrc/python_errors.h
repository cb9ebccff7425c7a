// python_errors.h -- C++ exceptions as the Python exceptions of hdispatch.errors.
#pragma once

#include <Python.h>

namespace hdispatch {

/// Looks the exception classes of hdispatch.errors up; once, at import.
void load_error_classes();

/// Sets the Python error for the exception in flight; call it in a catch block.
void set_python_error() noexcept;

}  // namespace hdispatch
