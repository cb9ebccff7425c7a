// python_errors.h -- C++ exceptions as the Python exceptions of hdispatch.errors; work without the GIL that may throw.
#pragma once

#include <Python.h>
#include <cxxabi.h>

#include <exception>

namespace hdispatch {

/// Looks the exception classes of hdispatch.errors up; once, at import.
void load_error_classes();

/// Throws torch's python_error, which leaves the Python error that is set as it is; here alone, for its header takes 13
/// s to compile.
[[noreturn]] void throw_python_error();

/// Sets the Python error for the exception in flight; call it in a catch block.
void set_python_error() noexcept;

/// Runs `work`, which may throw, without the GIL. A daemon thread that asks for it back while the interpreter ends is
/// unwound from there: out of a destructor, as pybind11::gil_scoped_release asks, that ends the process.
template <typename Work>
void without_gil(const Work& work) {
  std::exception_ptr error;
  PyThreadState* const state = PyEval_SaveThread();
  try {
    work();
  } catch (abi::__forced_unwind&) {
    throw;
  } catch (...) {
    error = std::current_exception();
  }
  PyEval_RestoreThread(state);
  if (error) std::rethrow_exception(error);
}

}  // namespace hdispatch
