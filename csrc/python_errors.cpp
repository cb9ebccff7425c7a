// python_errors.cpp -- C++ exceptions as Python errors.
#include "python_errors.h"

#include <c10/util/Exception.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include <exception>
#include <iterator>
#include <string_view>

#include "check.h"

namespace hdispatch {
namespace {

PyObject* error_classes[6];  // by Fault; owned

/// What the loader or a function of somebody else says may be no UTF-8.
void set_error(PyObject* kind, std::string_view text) noexcept {
  PyObject* words = PyUnicode_DecodeUTF8(text.data(), static_cast<Py_ssize_t>(text.size()), "replace");
  if (words) PyErr_SetObject(kind, words);
  Py_XDECREF(words);
}

}  // namespace

void load_error_classes() {
  const auto errors = pybind11::module_::import("hdispatch.errors");
  const char* names[] = {"ArgumentError", "BundleError", "MissError", "DriverError", "FunctionError", "HdispatchError"};
  for (size_t i = 0; i < std::size(names); ++i)
    error_classes[i] = pybind11::object(errors.attr(names[i])).release().ptr();
}

void throw_python_error() { throw python_error(); }

void set_python_error() noexcept {
  try {
    throw;
  } catch (const Error& error) {
    set_error(error_classes[static_cast<size_t>(error.fault())], error.what());
  } catch (python_error& error) {
    error.restore();
  } catch (pybind11::error_already_set& error) {
    error.restore();
  } catch (const c10::Error&) {  // torch's own, by kind: OutOfMemoryError, IndexError, …
    torch::translate_exception_to_python(std::current_exception());
  } catch (const std::exception& error) {
    set_error(error_classes[static_cast<size_t>(Fault::kInternal)], error.what());
  }
}

}  // namespace hdispatch
