// adopted_table.h -- the keys of one adopted kernel and what was made of each; grows, and is never emptied while it
// serves.
#pragma once

#include <Python.h>

#include <memory>
#include <string>
#include <vector>

#include "adopted_key.h"
#include "adopted_row.h"

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
  /// From now on the entry has its key, in the place of one of other choices; one of the same choices stays.
  void put(std::unique_ptr<AdoptedEntry> entry);
  bool is_full() const noexcept { return entries_.size() >= kMax; }
  const std::vector<std::unique_ptr<AdoptedEntry>>& entries() const noexcept { return entries_; }
  /// Entries whose keys others have by now; a call may be in one.
  const std::vector<std::unique_ptr<AdoptedEntry>>& replaced() const noexcept { return replaced_; }
  void clear() noexcept;

 private:
  void rehash(size_t slots);

  std::vector<std::unique_ptr<AdoptedEntry>> entries_;
  std::vector<std::unique_ptr<AdoptedEntry>> replaced_;
  std::vector<AdoptedEntry*> slots_;
};

}  // namespace hdispatch
