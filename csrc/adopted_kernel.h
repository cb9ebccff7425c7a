// adopted_kernel.h -- a Triton kernel of somebody else's: its rows by key, what a row depends on beside the call,
// misses.
//
//   kernel[grid](*args)          calls of one form -> key (adopted_key.h) -> row (adopted_row.h) -> driver
//   the first call of a key      Triton itself, then `learn` makes what it compiled a row
//   everything unusual           Triton itself, counted by reason
//
// What the code depends on beside the arguments: Triton's knobs, hooks, captured globals, the function's source. None
// of it is asked for per call: dicts say by their version whether somebody has written to them, and only then Python is
// asked (`AdoptedCallbacks`) what holds now.
//
// Who may call: holders of the GIL. Rows are never freed before the kernel is.
#pragma once

#include <Python.h>

#include <memory>
#include <string>
#include <vector>

#include "adopted_key.h"
#include "adopted_row.h"
#include "op.h"

namespace hdispatch {

/// Whether a dict has been written to.
struct WatchedDict {
  PyObject* dict = nullptr;  ///< owned
  uint64_t version = 0;

  bool is_same() const noexcept;
  void note() noexcept;
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
  bool has_its_globals() noexcept {
    for (const Scope& each : scopes_)
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

  bool compare_globals();

  int number_ = -1;
  std::string reason_;
  std::vector<WatchedDict> dicts_;
  std::vector<PyObject*> hooks_;  ///< lists; owned
  std::vector<Scope> scopes_;
};

/// What Python is asked; owned for ever.
struct AdoptedCallbacks {
  PyObject* process_state = nullptr;  ///< () -> what WatchedState::set takes
  PyObject* kernel_state = nullptr;   ///< (kernel) -> the same
  PyObject* learn = nullptr;          ///< (kernel, compiled) -> str, the reason for no row, or the row as a dict
};
extern AdoptedCallbacks adopted_callbacks;

/// One key of a kernel.
struct AdoptedEntry {
  std::vector<uint64_t> words;
  uint64_t hash = 0;
  std::unique_ptr<AdoptedRow> row;  ///< null: Triton's, for `reason`
  std::string reason;
  PyObject* compiled = nullptr;   ///< what the call returns; owned
  PyObject* constants = nullptr;  ///< dict by parameter names: what callable grids read beside the arguments; owned
  PyObject* config = nullptr;     ///< of an autotuner's; owned
  Py_ssize_t tuned = 0;           ///< keys that the autotuner had chosen for by then

  ~AdoptedEntry() {
    Py_XDECREF(compiled);
    Py_XDECREF(constants);
    Py_XDECREF(config);
  }
};

class AdoptedTable {
 public:
  static constexpr size_t kMax = 1 << 16;

  const AdoptedEntry* find(const AdoptedCall& call) const noexcept;
  /// The entry that has the key from now on: the one that had it already, if there is one.
  const AdoptedEntry* insert(std::unique_ptr<AdoptedEntry> entry);
  bool is_full() const noexcept { return entries_.size() >= kMax; }
  const std::vector<std::unique_ptr<AdoptedEntry>>& entries() const noexcept { return entries_; }
  void clear() noexcept;

 private:
  void rehash(size_t slots);

  std::vector<std::unique_ptr<AdoptedEntry>> entries_;
  std::vector<const AdoptedEntry*> slots_;
};

/// How heuristics are computed: Triton's decorator, before anything else.
struct AdoptedHeuristic {
  int parameter;  ///< -1: an option
  PyObject* name;
  PyObject* function;
};

/// The Python object behind an adopted kernel: in the kernel's own `__dict__`, so that it lives as long.
struct AdoptedKernel {
  PyObject_HEAD PyObject* kernel;  ///< borrowed
  PyObject* run;                   ///< Triton's own `run` of the kernel's class; owned
  bool is_on;
  bool is_null;  ///< the null driver, for tensors of the CPU
  std::string* name;
  KeyReader* reader;
  WatchedState* state;
  AdoptedTable* table;
  std::vector<AdoptedHeuristic>* heuristics;
  PyObject* tuner;        ///< the autotuner, whose `best_config` is kept up; borrowed; null without one
  PyObject* tuner_cache;  ///< its choices by key, a dict; owned
  PyObject* best_config;  ///< that it shows; borrowed from an entry
  OpCounters* counters;

  /// Serves a call, or has Triton serve it. `grid` of `run` is among its keywords, and null here.
  PyObject* call(PyObject* grid, PyObject* const* args, size_t positional, PyObject* keyword_names);
};

/// Makes the Python type; once, at import. Null with a Python error.
PyObject* make_adopted_type();
extern PyObject* adopted_type;

/// For the device that torch has current; 1 where the process sees one GPU.
void set_adopted_device_count(int count);

}  // namespace hdispatch
