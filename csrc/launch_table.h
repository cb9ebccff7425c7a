// launch_table.h -- the launch table: key -> launcher. Open addressing, built once, then only read.
//
// Any number of threads may `find` without a lock: nothing is written after construction.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "key.h"

namespace hdispatch {

class Launcher;

/// One row. `launcher` is owned by the table's owner and outlives it.
struct Row {
  Key key;
  const Launcher* launcher = nullptr;
  uint32_t index = 0;  ///< position in the manifest
};

class LaunchTable {
 public:
  LaunchTable() : LaunchTable(std::vector<Row>{}) {}
  /// Throws kBundle if two rows have one key.
  explicit LaunchTable(std::vector<Row> rows);

  /// The row of that key, or null.
  const Row* find(const Key& key) const noexcept {
    for (uint64_t slot = hash(key) >> shift_;; slot = (slot + 1) & mask_) {
      const Row& row = slots_[slot];
      if (row.key == key) return &row;
      if (row.key == kEmpty) return nullptr;
    }
  }

  /// All rows, in the manifest's order.
  const std::vector<Row>& rows() const noexcept { return rows_; }

 private:
  /// No key of ours: op ids stay below 0xffff.
  static constexpr Key kEmpty = {~0ull, ~0ull};

  struct Release {
    void operator()(Row* slots) const noexcept;
  };

  std::vector<Row> rows_;
  std::unique_ptr<Row[], Release> slots_;
  uint64_t mask_ = 0;  ///< slots - 1
  int shift_ = 0;      ///< 64 - log2(slots)
};
static_assert(sizeof(Row) == 32, "two rows per cache line");

}  // namespace hdispatch
