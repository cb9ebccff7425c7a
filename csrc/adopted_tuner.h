// adopted_tuner.h -- an autotuner around an adopted kernel: whether its choices are those that rows were made of.
#pragma once

#include <Python.h>

#include <array>
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
    if (HD_UNLIKELY(!attributes_.is_same()) || HD_UNLIKELY(!cache_.is_same()) || HD_UNLIKELY(!has_its_only_one()))
      look();
    return number_;
  }
  /// All choices count as taken back, for somebody has written to a configuration. Their number from now on.
  uint32_t take_back() noexcept { return ++number_; }
  /// Whether kernel, keys and configurations are those of the adoption, for which the key was made, and nobody has put
  /// another `run` over Triton's. After `choices`.
  bool has_its_parts() const noexcept {
    return HD_LIKELY(is_its_own_) && HD_LIKELY(PyList_GET_SIZE(part(kConfigurations)) == count_) &&
           HD_LIKELY(has_its_keys());
  }
  /// Whether a configuration was chosen for a key of Triton's (None: it is the only one) when `choices` looked last, so
  /// that taking it back will be seen. May run Python.
  bool has_chosen(PyObject* key, PyObject* config) const;

  /// Makes `best_config` that of a launch. `config` is an entry's. May run Python.
  void show(PyObject* config) {
    if (HD_UNLIKELY(config != shown_)) show_other(config);
  }
  /// Triton shows another one.
  void forget_shown() noexcept { shown_ = nullptr; }

  int traverse(visitproc visit, void* arg) const;
  void clear() noexcept;

 private:
  enum Part : uint8_t { kConfigurations, kKernel, kKeys, kNames, kParts };

  PyObject* part(Part which) const noexcept { return parts_[which]; }
  /// A list is not watched: the only configuration is launched without a look at the cache.
  bool has_its_only_one() const noexcept {
    return !only_ ||
           (PyList_GET_SIZE(part(kConfigurations)) == 1 && PyList_GET_ITEM(part(kConfigurations), 0) == only_);
  }
  bool has_its_keys() const noexcept {
    if (!key_names_) return true;
    if (PyList_GET_SIZE(part(kKeys)) != PyTuple_GET_SIZE(key_names_)) return false;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(key_names_); ++i)
      if (HD_UNLIKELY(PyList_GET_ITEM(part(kKeys), i) != PyTuple_GET_ITEM(key_names_, i))) return false;
    return true;
  }
  bool finds_its_parts() const;
  void look();
  void show_other(PyObject* config);

  PyObject* tuner_;                        ///< borrowed
  WatchedDict attributes_;                 ///< its own
  WatchedDict cache_;                      ///< its choices by key
  PyObject* known_ = nullptr;              ///< a copy of it, never written to; owned
  std::array<PyObject*, kParts> parts_{};  ///< its attributes at the adoption; owned
  Py_ssize_t count_ = 0;                   ///< of configurations
  PyObject* only_ = nullptr;               ///< of one configuration; owned
  PyObject* key_names_ = nullptr;          ///< what the list of keys had, if Triton chooses by them; owned
  bool is_its_own_ = true;
  uint32_t number_ = 1;
  PyObject* shown_ = nullptr;  ///< borrowed from an entry
};

}  // namespace hdispatch
