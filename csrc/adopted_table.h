// adopted_table.h -- the keys of one adopted kernel and what was made of each; grows, and is never emptied while it
// serves.
#pragma once

#include <Python.h>

#include <array>
#include <memory>
#include <string>
#include <vector>

#include "adopted_key.h"
#include "adopted_row.h"
#include "adopted_state.h"

namespace hdispatch {

/// One key of a kernel.
struct AdoptedEntry {
  std::vector<uint64_t> words;
  uint64_t hash = 0;
  std::unique_ptr<AdoptedRow> row;  ///< null: Triton's, for `reason`
  std::string reason;
  PyObject* compiled = nullptr;   ///< what the call returns; owned
  PyObject* constants = nullptr;  ///< dict by parameter names: what callable grids read beside the arguments; owned
  PyObject* config = nullptr;     ///< of an autotuner's; owned
  uint32_t choices = 0;           ///< of the autotuner's (AdoptedTuner::choices) when Triton made the call
  std::array<WatchedDict, 2> config_state{};  ///< what the config is made of; empty where there is none
  size_t place = 0;                           ///< among the table's entries
  std::unique_ptr<AdoptedEntry> former;       ///< the key's entry of other choices; a call may be in it

  ~AdoptedEntry() {
    Py_XDECREF(compiled);
    Py_XDECREF(constants);
    Py_XDECREF(config);
    for (WatchedDict& each : config_state) Py_XDECREF(each.dict);
  }
  /// Nobody has written to the config.
  bool has_its_config() const noexcept {
    return !config_state[0].dict || (HD_LIKELY(config_state[0].is_same()) && HD_LIKELY(config_state[1].is_same()));
  }
};

class AdoptedTable {
 public:
  static constexpr size_t kMax = 1 << 16;

  const AdoptedEntry* find(const AdoptedCall& call) const noexcept;
  /// From now on the entry has its key, in the place of one of other choices; one of the same choices stays. Takes as
  /// long however many keys there are.
  void put(std::unique_ptr<AdoptedEntry> entry);
  bool is_full() const noexcept { return entries_.size() >= kMax; }
  const std::vector<std::unique_ptr<AdoptedEntry>>& entries() const noexcept { return entries_; }
  void clear() noexcept;

 private:
  void rehash(size_t slots);

  std::vector<std::unique_ptr<AdoptedEntry>> entries_;
  std::vector<AdoptedEntry*> slots_;
};

}  // namespace hdispatch
