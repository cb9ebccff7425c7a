// adopted_tuner.h -- an autotuner around an adopted kernel: whether its choices are those that rows were made of.
#pragma once

#include <Python.h>

#include <cstdint>

#include "adopted_state.h"

namespace hdispatch {

/// Who may call: holders of the GIL. The autotuner lives as long.
class AdoptedTuner {
 public:
  /// Throws a Python error.
  explicit AdoptedTuner(PyObject* tuner);
  ~AdoptedTuner() { clear(); }
  AdoptedTuner(const AdoptedTuner&) = delete;
  AdoptedTuner& operator=(const AdoptedTuner&) = delete;

  /// The number of the choices that hold now: another one once a choice was taken back or replaced. May run Python.
  uint32_t choices() {
    if (HD_UNLIKELY(!attributes_.is_same()) || HD_UNLIKELY(!cache_.is_same())) look();
    return number_;
  }
  /// Whether the configurations are those of the adoption, for which the key was made, and nobody has put another `run`
  /// over Triton's. After `choices`.
  bool has_its_configurations() const noexcept {
    return HD_LIKELY(is_its_own_) && HD_LIKELY(PyList_GET_SIZE(configurations_) == count_);
  }

  /// Makes `best_config` that of a launch. `config` is an entry's. May run Python.
  void show(PyObject* config) {
    if (HD_UNLIKELY(config != shown_)) show_other(config);
  }
  /// Triton shows another one.
  void forget_shown() noexcept { shown_ = nullptr; }

  int traverse(visitproc visit, void* arg) const;
  void clear() noexcept;

 private:
  void look();
  void show_other(PyObject* config);

  PyObject* tuner_;                     ///< borrowed
  WatchedDict attributes_;              ///< its own
  WatchedDict cache_;                   ///< its choices by key
  PyObject* known_ = nullptr;           ///< a copy of it, never written to; owned
  PyObject* configurations_ = nullptr;  ///< a list; owned
  Py_ssize_t count_ = 0;
  bool is_its_own_ = true;
  uint32_t number_ = 1;
  PyObject* shown_ = nullptr;  ///< borrowed from an entry
};

}  // namespace hdispatch
