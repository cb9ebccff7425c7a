// launch_table.cpp -- building the launch table.
#include "launch_table.h"

#include <bit>

#include "check.h"

namespace hdispatch {

LaunchTable::LaunchTable(std::vector<Row> rows) : rows_(std::move(rows)) {
  // At most half full: linear probes then end within two slots on average, hit or miss.
  const uint64_t capacity = std::bit_ceil(std::max<uint64_t>(2 * rows_.size(), 8));
  mask_ = capacity - 1;
  slots_.assign(capacity, Row{kEmpty, nullptr, 0});
  for (const Row& row : rows_) {
    HD_CHECK(row.key != kEmpty, "row ", row.index);
    uint64_t slot = hash(row.key) & mask_;
    while (slots_[slot].key != kEmpty) {
      HD_CHECK_BUNDLE(slots_[slot].key != row.key, "rows ", slots_[slot].index, " and ", row.index,
                      " have the same key (op ", key_op(row.key), ", variant ", key_variant(row.key), ", K ",
                      key_k(row.key), ", N ", key_n(row.key), ", bucket ", key_bucket(row.key), ")");
      slot = (slot + 1) & mask_;
    }
    slots_[slot] = row;
  }
}

}  // namespace hdispatch
