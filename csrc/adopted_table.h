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

}  // namespace hdispatch
