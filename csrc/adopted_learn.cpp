// adopted_learn.cpp -- parameters, configuration and function of what Triton compiled, as Python reports them.
#include "adopted_learn.h"

#include <pybind11/stl.h>

#include "python_errors.h"

namespace hdispatch {
namespace {

template <typename Value>
Value field(PyObject* row, const char* name) {
  const pybind11::handle dict(row);
  return dict[name].cast<Value>();
}

/// How an argument becomes a parameter of a Triton type ("*fp32", "i32", "u1", …); false if Triton is to do it.
bool make_param(std::string_view type, uint16_t code, AdoptedParam& param) {
  const ArgumentClass kind = class_of_code(code);
  const bool is_float = kind == ArgumentClass::kFloat;
  const bool is_integer = kind == ArgumentClass::kInt32 || kind == ArgumentClass::kInt64 ||
                          kind == ArgumentClass::kOne || kind == ArgumentClass::kBool;
  if (type.starts_with("*")) return kind == ArgumentClass::kTensor || kind == ArgumentClass::kNone;
  if (type.starts_with("fp") || type == "bf16") {
    if (!is_float && !is_integer) return false;
    param.bytes = type == "fp64" ? 8 : type == "fp32" ? 4 : 2;
    if (type == "fp32") param.conversion = is_float ? Conversion::kFloatToF32 : Conversion::kIntToF32;
    if (type == "fp64") param.conversion = is_float ? Conversion::kNone : Conversion::kIntToF64;
    if (type == "bf16") param.conversion = is_float ? Conversion::kFloatToBF16 : Conversion::kIntToBF16;
    return type == "fp32" || type == "fp64" || type == "bf16";
  }
  const bool is_wide = type == "i64" || type == "u64";
  const bool is_32 = type == "i32" || type == "u32";
  const bool is_16 = type == "i16" || type == "u16";
  const bool is_8 = type == "i8" || type == "u8" || type == "i1" || type == "u1";
  param.bytes = is_wide ? 8 : is_32 ? 4 : is_16 ? 2 : 1;
  // A value that a narrower or unsigned type does not hold is refused by Triton, or cut off; it says.
  const bool is_small = kind == ArgumentClass::kOne || kind == ArgumentClass::kBool;
  if (type == "u64") return is_small || kind == ArgumentClass::kUInt64;
  if (type == "i64") return is_integer;
  if (type == "i32") return is_small || kind == ArgumentClass::kInt32;
  return (is_32 || is_16 || is_8) && is_small;
}

HD_COLD std::string make_row(const AdoptedKernel& self, const AdoptedCall& call, PyObject* said, LaunchPlace place,
                             AdoptedEntry& entry) {
  AdoptedCode code;
  code.name = *self.name;
  code.function = reinterpret_cast<CUfunction>(field<uintptr_t>(said, "function"));
  code.num_warps = field<uint32_t>(said, "num_warps");
  code.shared_bytes = field<uint32_t>(said, "shared_bytes");
  code.cluster = field<uint32_t>(said, "cluster");
  code.cooperative = field<bool>(said, "cooperative");
  code.pdl = field<bool>(said, "pdl");
  code.releases = field<bool>(said, "releases");
  for (const auto& [argument, type] : field<std::vector<std::pair<size_t, std::string>>>(said, "params")) {
    AdoptedParam param{static_cast<uint16_t>(argument)};
    if (argument >= call.value_count || !make_param(type, call.codes[argument], param))
      return text("argument of type ", type, " is made otherwise");
    code.params.push_back(param);
  }
  HD_DRIVER(*place.driver, place.driver->context_get(&place.context), "cuCtxGetCurrent", code.name);
  entry.row = std::make_unique<AdoptedRow>(code, place);
  return {};
}

/// Begins to watch a configuration of an autotuner's; one of another kind is not watched, and has no row.
void watch_config(PyObject* config, AdoptedEntry& entry) {
  static PyObject* const name = PyUnicode_InternFromString("kwargs");
  const Owned own{PyObject_GenericGetDict(config, nullptr)};
  if (!own.object) return PyErr_Clear();
  PyObject* keywords = PyDict_GetItemWithError(own.object, name);
  if (!keywords || !PyDict_Check(keywords)) return PyErr_Clear();
  entry.config_state = {WatchedDict{Py_NewRef(own.object)}, WatchedDict{Py_NewRef(keywords)}};
  for (WatchedDict& each : entry.config_state) each.note();
}

}  // namespace

HD_COLD void learn(AdoptedKernel& self, const AdoptedCall& call, const LaunchPlace& place, PyObject* compiled,
                   uint32_t choices, PyObject* config) {
  if (compiled == Py_None) return;
  const AdoptedEntry* former = self.table->find(call);
  if (former ? former->choices == choices : self.table->is_full()) return;
  auto entry = std::make_unique<AdoptedEntry>();
  entry->config = Py_XNewRef(config);
  if (config) watch_config(config, *entry);  // first: what is written meanwhile is seen by the next call
  const Owned said{
      PyObject_CallFunctionObjArgs(adopted_callbacks.learn, self.kernel, compiled, config ? config : Py_None, nullptr)};
  if (!said.object) throw_python_error();
  entry->words.assign(call.words, call.words + call.count);
  entry->hash = call.hash;
  if (PyUnicode_Check(said.object)) {
    entry->reason = PyUnicode_AsUTF8(said.object);
    if (entry->reason.empty()) return;  // not yet
  } else {
    try {
      entry->reason = make_row(self, call, said.object, place, *entry);
    } catch (const Error& error) {
      if (error.fault() != Fault::kBundle) throw;
      entry->reason = error.what();
    }
    entry->constants = Py_XNewRef(PyDict_GetItemString(said.object, "constants"));
  }
  entry->compiled = Py_NewRef(compiled);
  entry->choices = choices;
  self.table->put(std::move(entry));
}

}  // namespace hdispatch
