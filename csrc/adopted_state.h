// adopted_state.h -- what compiled Triton code depends on beside a call's arguments, and whether it still holds.
//
// Triton's knobs, hooks, captured globals, the function's source: none of it is asked for per call. Of dicts it is
// known whether somebody has written to them, and only then Python is asked what holds now (adopted_kernel.h).
#pragma once

#include <Python.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "check.h"

namespace hdispatch {

/// The reference is given away when this ends.
struct Owned {
  PyObject* object = nullptr;
  ~Owned() { Py_XDECREF(object); }
};

/// Whether a dict has been written to since `note`. A copy does not own the dict, and ends before the one that does.
///
/// CPython 3.11 marks each write in the dict; from 3.12 on it tells those who watch the dict.
struct WatchedDict {
  PyObject* dict = nullptr;          ///< owned
  const uint64_t* writes = nullptr;  ///< how often somebody has written to the dict; null: as written to since
  uint64_t noted = 0;

  bool is_same() const noexcept;
  void note();
};

/// What must hold for rows to be what Triton would launch. Made from what Python says.
class WatchedState {
 public:
  WatchedState() = default;
  ~WatchedState() { clear(); }
  WatchedState(const WatchedState&) = delete;
  WatchedState& operator=(const WatchedState&) = delete;

  /// Nothing has been written to what this state was made from.
  bool is_same() const noexcept {
    for (const WatchedDict& each : dicts_)
      if (HD_UNLIKELY(!each.is_same())) return false;
    return !dicts_.empty();
  }
  /// No list of hooks has an entry.
  bool has_no_hooks() const noexcept {
    for (PyObject* each : hooks_)
      if (HD_UNLIKELY(PyList_GET_SIZE(each) != 0)) return false;
    return true;
  }
  /// No captured global has another value. May run Python.
  bool has_its_globals() {
    if (HD_LIKELY(!scopes_)) return true;
    for (const Scope& each : scopes_->listed)
      if (HD_UNLIKELY(!each.watched.is_same()) || HD_UNLIKELY(each.is_mutable)) return compare_globals();
    return true;
  }

  /// (number or -1, reason, [dict], [list], [(dict, name, value, is_mutable)]). False with a Python error.
  bool set(PyObject* given);
  int number() const noexcept { return number_; }
  const std::string& reason() const noexcept { return reason_; }
  int traverse(visitproc visit, void* arg) const;
  void clear() noexcept;

 private:
  struct Global {
    PyObject* name;
    PyObject* value;     ///< as it was when the code was compiled
    PyObject* identity;  ///< the object that was last found equal to it
    bool is_mutable;
  };
  struct Scope {
    WatchedDict watched;
    std::vector<Global> globals;
    bool is_mutable = false;  ///< has a global that changes without a write to the dict
  };

  /// Held while they are compared, which may run Python and replace them.
  struct Scopes {
    std::vector<Scope> listed;

    ~Scopes();
  };

  bool compare_globals();

  int number_ = -1;
  std::string reason_;
  std::vector<WatchedDict> dicts_;
  std::vector<PyObject*> hooks_;    ///< lists; owned
  std::shared_ptr<Scopes> scopes_;  ///< null without captured globals
};

}  // namespace hdispatch
