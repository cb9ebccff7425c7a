// op_arguments.cpp -- positional, keyword and default arguments put in order.
#include "op_arguments.h"

#include <algorithm>
#include <map>
#include <string>

#include "check.h"
#include "python_errors.h"

namespace hdispatch {
namespace {
/// A Python int that is never freed, for defaults: the arguments of a call are borrowed.
PyObject* small_int(int64_t value) {
  static auto* made = new std::map<int64_t, PyObject*>;
  PyObject*& object = (*made)[value];
  if (!object) object = PyLong_FromLongLong(value);
  if (!object) throw_python_error();
  return object;
}

/// The same for a string.
PyObject* lasting_text(const std::string& value) {
  static auto* made = new std::map<std::string, PyObject*>;
  PyObject*& object = (*made)[value];
  if (!object) object = PyUnicode_FromStringAndSize(value.data(), static_cast<Py_ssize_t>(value.size()));
  if (!object) throw_python_error();
  return object;
}
}  // namespace

PyObject* default_argument(const ArgSpec& arg) {
  if (arg.kind == ArgKind::kNone || (arg.is_tensor() && (arg.is_optional || arg.is_returned))) return Py_None;
  if (!arg.has_default) return nullptr;
  if (arg.kind == ArgKind::kBool) return arg.default_value ? Py_True : Py_False;
  if (arg.kind == ArgKind::kString) return lasting_text(arg.texts[static_cast<size_t>(arg.default_value)]);
  return small_int(arg.default_value);
}

std::vector<PyObject*> gather_arguments(const Op& op, PyObject* const* args, size_t positional,
                                        PyObject* keyword_names) {
  const std::vector<ArgSpec>& specs = op.args();
  if (positional > specs.size())
    fail(Fault::kCaller, op.name(), ": got ", positional, " positional arguments; it takes ", specs.size(), ": ",
         op.schema());
  std::vector<PyObject*> all(specs.size(), nullptr);
  std::copy(args, args + positional, all.begin());
  const Py_ssize_t keywords = keyword_names ? PyTuple_GET_SIZE(keyword_names) : 0;
  for (Py_ssize_t k = 0; k < keywords; ++k) {
    const char* keyword = PyUnicode_AsUTF8(PyTuple_GET_ITEM(keyword_names, k));
    size_t i = 0;
    while (keyword && i < specs.size() && specs[i].name != keyword) ++i;
    if (!keyword || i == specs.size())
      fail(Fault::kCaller, op.name(), ": has no argument \"", keyword ? keyword : "?", "\": ", op.schema());
    if (all[i]) fail(Fault::kCaller, op.name(), ": argument \"", keyword, "\" is given twice");
    all[i] = args[positional + static_cast<size_t>(k)];
  }
  for (size_t i = 0; i < specs.size(); ++i) {
    if (!all[i]) all[i] = default_argument(specs[i]);
    if (!all[i]) fail(Fault::kCaller, op.name(), ": argument \"", specs[i].name, "\" is missing: ", op.schema());
  }
  return all;
}

}  // namespace hdispatch
