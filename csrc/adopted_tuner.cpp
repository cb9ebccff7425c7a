// adopted_tuner.cpp -- comparing an autotuner's choices with those that were known.
#include "adopted_tuner.h"

#include <utility>

#include "python_errors.h"

namespace hdispatch {
namespace {

/// By AdoptedTuner::Part.
constexpr const char* kPartNames[] = {"configs", "fn", "keys", "arg_names"};

/// An attribute that is a dict, or a list; owned. Throws a Python error.
PyObject* attribute(PyObject* object, const char* name, bool is_dict) {
  PyObject* found = PyObject_GetAttrString(object, name);
  if (!found) throw_python_error();
  if (is_dict ? PyDict_Check(found) : PyList_Check(found)) return found;
  PyErr_Format(PyExc_TypeError, "hdispatch: an adopted autotuner's %s is a %s; Triton's is a %s", name,
               Py_TYPE(found)->tp_name, is_dict ? "dict" : "list");
  Py_DECREF(found);
  throw_python_error();
}

/// Whether a dict has all that a copy of it had. May run Python, which may write to the dict.
bool has_all(PyObject* dict, PyObject* known) {
  const Owned held{Py_NewRef(known)};
  PyObject *key = nullptr, *value = nullptr;
  for (Py_ssize_t at = 0; PyDict_Next(known, &at, &key, &value);) {
    PyObject* found = PyDict_GetItemWithError(dict, key);
    if (!found && PyErr_Occurred()) throw_python_error();
    if (found != value) return false;
  }
  return true;
}

}  // namespace

AdoptedTuner::AdoptedTuner(PyObject* tuner) : tuner_(tuner) {
  attributes_.dict = PyObject_GenericGetDict(tuner, nullptr);
  if (!attributes_.dict) throw_python_error();
  cache_.dict = attribute(tuner, "cache", true);
  parts_[kConfigurations] = attribute(tuner, "configs", false);
  for (const Part each : {kKernel, kKeys, kNames})
    if (!(parts_[each] = PyObject_GetAttrString(tuner, kPartNames[each]))) throw_python_error();
  count_ = PyList_GET_SIZE(part(kConfigurations));
  if (count_ == 1)
    only_ = Py_NewRef(PyList_GET_ITEM(part(kConfigurations), 0));
  else if (PyList_Check(part(kKeys)) && !(key_names_ = PyList_AsTuple(part(kKeys))))
    throw_python_error();
  attributes_.note();
  cache_.note();
  is_its_own_ = finds_its_parts();
  known_ = PyDict_Copy(cache_.dict);
  if (!known_) throw_python_error();
}

bool AdoptedTuner::has_chosen(PyObject* key, PyObject* config) const {
  if (key == Py_None) return config == only_;
  const Owned known{Py_NewRef(known_)};
  PyObject* found = PyDict_GetItemWithError(known.object, key);
  if (!found && PyErr_Occurred()) throw_python_error();
  return found == config;
}

/// Whether its attributes are those of the adoption, and its `run` is Triton's.
HD_COLD bool AdoptedTuner::finds_its_parts() const {
  for (size_t each = 0; each < kParts; ++each) {
    const Owned now{PyObject_GetAttrString(tuner_, kPartNames[each])};
    if (!now.object) throw_python_error();
    if (now.object != parts_[each]) return false;
  }
  static PyObject* const run = PyUnicode_InternFromString("run");
  const int has_run = PyDict_Contains(attributes_.dict, run);
  if (has_run < 0) throw_python_error();
  return !has_run;
}

HD_COLD void AdoptedTuner::look() {
  attributes_.note();  // first: what is written meanwhile is looked at again
  const Owned cache{PyObject_GetAttrString(tuner_, "cache")};
  if (!cache.object) throw_python_error();
  is_its_own_ = finds_its_parts() && PyDict_Check(cache.object);
  if (!is_its_own_) return;
  if (!has_its_only_one() && PyList_GET_SIZE(part(kConfigurations)) == 1) {
    const Owned former{std::exchange(only_, Py_NewRef(PyList_GET_ITEM(part(kConfigurations), 0)))};
    ++number_;
  }
  if (cache.object == cache_.dict && cache_.is_same()) return;
  if (cache.object != cache_.dict) {
    PyObject* former = cache_.dict;
    cache_.dict = Py_NewRef(cache.object);
    cache_.note();
    Py_DECREF(former);
  } else {
    cache_.note();
  }
  const Owned known{PyDict_Copy(cache.object)};  // held: comparing may run Python, and come here again
  if (!known.object) throw_python_error();
  const Owned former{std::exchange(known_, Py_NewRef(known.object))};
  const uint32_t number = ++number_;  // until they are found equal: a comparison may raise
  if (has_all(known.object, former.object) && number_ == number) --number_;
}

HD_COLD void AdoptedTuner::show_other(PyObject* config) {
  const bool was_same = attributes_.is_same();
  if (PyObject_SetAttrString(tuner_, "best_config", config) != 0) throw_python_error();
  if (was_same) attributes_.note();  // nobody else has written
  shown_ = config;
}

int AdoptedTuner::traverse(visitproc visit, void* arg) const {
  Py_VISIT(attributes_.dict);
  Py_VISIT(cache_.dict);
  Py_VISIT(known_);
  for (PyObject* each : parts_) Py_VISIT(each);
  Py_VISIT(only_);
  Py_VISIT(key_names_);
  return 0;
}

void AdoptedTuner::clear() noexcept {
  for (WatchedDict* each : {&attributes_, &cache_}) {
    Py_CLEAR(each->dict);
    *each = {};
  }
  Py_CLEAR(known_);
  for (PyObject*& each : parts_) Py_CLEAR(each);
  Py_CLEAR(only_);
  Py_CLEAR(key_names_);
  shown_ = nullptr;
}

}  // namespace hdispatch
