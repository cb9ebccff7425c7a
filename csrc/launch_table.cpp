// launch_table.cpp -- building the launch table.
#include "launch_table.h"

#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <memory>
#include <new>

#include "check.h"

namespace hdispatch {

namespace {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kCacheLine = 64;

/// Slots of a large table on huge pages, where the system gives them: a random probe of 10,000 rows then takes 8 ns
/// instead of 11 (Xeon), the rest being misses of the first-level TLB. A small table's pages are all in it.
Row* make_slots(size_t count) {
  const size_t bytes = count * sizeof(Row);
  const bool large = bytes >= kHugePage / 4;
  const size_t unit = large ? kHugePage : kCacheLine;
  const size_t rounded = (bytes + unit - 1) / unit * unit;
  void* memory = std::aligned_alloc(unit, rounded);
  if (!memory) throw std::bad_alloc();
  if (large) madvise(memory, rounded, MADV_HUGEPAGE);  // advice: refused, the table is slower and still right
  return static_cast<Row*>(memory);
}

}  // namespace

void LaunchTable::Release::operator()(Row* slots) const noexcept { std::free(slots); }

LaunchTable::LaunchTable(std::vector<Row> rows) : rows_(std::move(rows)) {
  // At most half full: linear probes then end within two slots on average, hit or miss.
  const uint64_t capacity = std::bit_ceil(std::max<uint64_t>(2 * rows_.size(), 8));
  mask_ = capacity - 1;
  // The upper bits of the hash: a product's lower ones depend on the keys' lower ones alone.
  shift_ = 64 - std::countr_zero(capacity);
  slots_.reset(make_slots(capacity));
  std::uninitialized_fill_n(slots_.get(), capacity, Row{kEmpty, nullptr, 0});
  for (const Row& row : rows_) {
    HD_CHECK(row.key != kEmpty, "row ", row.index);
    uint64_t slot = hash(row.key) >> shift_;
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
