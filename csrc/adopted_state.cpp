// adopted_state.cpp -- reading states from Python, and comparing captured globals.
#include "adopted_state.h"

#include <algorithm>
#include <unordered_map>

#include "python_errors.h"

namespace hdispatch {

#if PY_VERSION_HEX < 0x030C0000
namespace {

const uint64_t* writes_of(PyObject* dict) {
  return &reinterpret_cast<PyDictObject*>(dict)->ma_version_tag;  // changes with each write
}

}  // namespace
#else
namespace {

/// The writes to each dict that was ever noted and lives. Guarded by the GIL, and never freed: dicts end after statics.
std::unordered_map<PyObject*, std::unique_ptr<uint64_t>>& all_writes() {
  static auto* const all = new std::unordered_map<PyObject*, std::unique_ptr<uint64_t>>;
  return *all;
}

/// CPython calls it before it writes to a watched dict, or frees it. An identical value is no write.
int before_write(PyDict_WatchEvent event, PyObject* dict, PyObject*, PyObject*) {
  const auto found = all_writes().find(dict);
  if (found == all_writes().end()) return 0;
  ++*found->second;
  if (event == PyDict_EVENT_DEALLOCATED)
    all_writes().erase(found);  // what owns the dict is gone, with all that point here
  return 0;
}

const uint64_t* writes_of(PyObject* dict) {
  static int watcher = -1;
  if (watcher < 0) watcher = PyDict_AddWatcher(before_write);
  if (watcher < 0) throw_python_error();  // CPython has eight
  const auto found = all_writes().find(dict);
  if (found != all_writes().end()) return found->second.get();
  if (PyDict_Watch(watcher, dict) != 0) throw_python_error();
  return all_writes().emplace(dict, std::make_unique<uint64_t>(0)).first->second.get();
}

}  // namespace
#endif

bool WatchedDict::is_same() const noexcept { return writes != nullptr && *writes == noted; }

void WatchedDict::note() {
  writes = writes_of(dict);
  noted = *writes;
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
      scopes.push_back({{Py_NewRef(dict)}, {}, false});  // not noted: compared at the next call
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
    scope.watched = seen;
  }
  return true;
}

}  // namespace hdispatch
