// device_table.h -- the frozen table that serves one device: the ops' ladders, the rows, the launchers.
//
// TableBuilder makes one, Runtime publishes it; it is never changed after that, so any thread reads it without a lock.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <vector>

#include "ffi_launcher.h"
#include "ladder.h"
#include "launch_place.h"
#include "launch_table.h"
#include "op.h"

namespace hdispatch {

/// How the rows of one op are found: its ladders, and which sizes of the key its rows leave open.
struct OpRows {
  const Op* op = nullptr;
  int second_arg = -1;      ///< the integer argument that has a ladder; -1: the op has none
  uint32_t mask_count = 0;  ///< 1 for an op whose rows are all exact
  /// For the key's second word, K and N: the most exact first. A row with K = 0 serves every K.
  std::array<uint64_t, 4> masks{};
  Ladder ladder;  ///< of M; size 0 for ops that the bundle does not have
  Ladder second;  ///< of the integer argument that has one

  static_assert(Ladder::kMaxBuckets * Ladder::kMaxBuckets <= 0x10000, "a key has 16 bits for the bucket");
  uint32_t buckets() const noexcept { return ladder.size() * (second_arg < 0 ? 1 : second.size()); }
  /// The bucket of both ladders, of an op that has two.
  uint32_t with_second(uint32_t bucket_of_m, int64_t integer) const noexcept {
    return bucket_of_m * second.size() + second.bucket(integer);
  }
};

struct DeviceTable : LaunchPlace {
  uint64_t generation = 0;  ///< of no other table, also of none before; not 0
  std::vector<OpRows> ops;  ///< by op id
  LaunchTable table;
  std::vector<std::unique_ptr<Launcher>> launchers;
  std::vector<std::unique_ptr<NullFunction>> null_functions;
  std::shared_ptr<const DeviceTable> base;  ///< the table that this one extends: its rows point to that one's launchers

  /// The rows of an op; null if the table has none.
  const OpRows* rows_of(const Op& op) const noexcept {
    return op.id() < ops.size() && ops[op.id()].ladder.size() ? &ops[op.id()] : nullptr;
  }
  /// The row that serves a key: an exact one, else one that leaves K or N open.
  const Row* find(const OpRows& rows, const Key& key) const noexcept {
    for (uint32_t i = 0; i < rows.mask_count; ++i)
      if (const Row* row = table.find({key.word0, key.word1 & rows.masks[i]})) return row;
    return nullptr;
  }
};

}  // namespace hdispatch
