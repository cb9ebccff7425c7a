// adopted_state.cpp -- reading states from Python, and comparing captured globals.
#include "adopted_state.h"

#include <algorithm>

namespace hdispatch {

bool WatchedDict::is_same() const noexcept {
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"
  return reinterpret_cast<PyDictObject*>(dict)->ma_version_tag == version;
#pragma GCC diagnostic pop
}

void WatchedDict::note() noexcept {
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"
  version = reinterpret_cast<PyDictObject*>(dict)->ma_version_tag;
#pragma GCC diagnostic pop
}

void WatchedState::clear() noexcept {
  for (WatchedDict& each : dicts_) Py_DECREF(each.dict);
  for (PyObject* each : hooks_) Py_DECREF(each);
  dicts_.clear();
  hooks_.clear();
  scopes_.reset();
}

WatchedState::Scopes::~Scopes() {
  for (Scope& scope : listed) {
    Py_DECREF(scope.watched.dict);
    for (Global& each : scope.globals) {
      Py_DECREF(each.name);
      Py_DECREF(each.value);
      Py_XDECREF(each.identity);
    }
  }
}

int WatchedState::traverse(visitproc visit, void* arg) const {
  for (const WatchedDict& each : dicts_) Py_VISIT(each.dict);
  for (PyObject* each : hooks_) Py_VISIT(each);
  if (!scopes_) return 0;
  for (const Scope& scope : scopes_->listed) {
    Py_VISIT(scope.watched.dict);
    for (const Global& each : scope.globals) {
      Py_VISIT(each.value);
      Py_VISIT(each.identity);
    }
  }
  return 0;
}

bool WatchedState::set(PyObject* given) {
  int number = 0;
  const char* reason = nullptr;
  PyObject *dicts = nullptr, *hooks = nullptr, *globals = nullptr;
  if (!PyArg_ParseTuple(given, "isO!O!O!", &number, &reason, &PyList_Type, &dicts, &PyList_Type, &hooks, &PyList_Type,
                        &globals))
    return false;
  WatchedState made;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(dicts); ++i) {
    made.dicts_.push_back({Py_NewRef(PyList_GET_ITEM(dicts, i))});
    made.dicts_.back().note();
  }
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(hooks); ++i) made.hooks_.push_back(Py_NewRef(PyList_GET_ITEM(hooks, i)));
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(globals); ++i) {
    PyObject *dict = nullptr, *name = nullptr, *value = nullptr;
    int is_mutable = 0;
    if (!PyArg_ParseTuple(PyList_GET_ITEM(globals, i), "O!UOp", &PyDict_Type, &dict, &name, &value, &is_mutable))
      return false;
    if (!made.scopes_) made.scopes_ = std::make_shared<Scopes>();
    std::vector<Scope>& scopes = made.scopes_->listed;
    auto scope = std::ranges::find_if(scopes, [dict](const Scope& each) { return each.watched.dict == dict; });
    if (scope == scopes.end()) {
      scopes.push_back({{Py_NewRef(dict)}, {}, false});  // its version 0 is no dict's: compared at the next call
      scope = scopes.end() - 1;
    }
    scope->globals.push_back({Py_NewRef(name), Py_NewRef(value), nullptr, is_mutable != 0});
    scope->is_mutable = scope->is_mutable || is_mutable;
  }
  made.number_ = number;
  made.reason_ = reason;
  std::swap(dicts_, made.dicts_);
  std::swap(hooks_, made.hooks_);
  std::swap(scopes_, made.scopes_);
  number_ = made.number_;
  std::swap(reason_, made.reason_);
  return true;
}

/// As Triton: a value that is not equal to the one that the code was compiled with. False with or without an error.
HD_COLD bool WatchedState::compare_globals() {
  const std::shared_ptr<Scopes> held_scopes = scopes_;
  for (Scope& scope : held_scopes->listed) {
    if (scope.watched.is_same() && !scope.is_mutable) continue;
    WatchedDict seen = scope.watched;
    seen.note();  // before: comparing may run Python
    for (Global& each : scope.globals) {
      PyObject* now = PyDict_GetItemWithError(scope.watched.dict, each.name);
      if (!now) return false;
      if (now == each.identity && !each.is_mutable) continue;
      const Owned held{Py_NewRef(now)};
      const int differs = PyObject_RichCompareBool(now, each.value, Py_NE);
      if (differs != 0) return false;
      Py_XSETREF(each.identity, Py_NewRef(now));
    }
    scope.watched.version = seen.version;
  }
  return true;
}

}  // namespace hdispatch
