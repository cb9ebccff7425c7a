// pending_writes.h -- what earlier launches may still be writing when a launch with the PDL attribute begins.
//
// A kernel launched with the PDL attribute begins when all blocks of the kernel before it on the stream have released
// their dependents or ended. Ours wait (griddepcontrol.wait: the kernel before has completed, and what it wrote is
// visible) before they touch what another kernel may write. But some (Record::early) first read arguments that hardly
// ever change, weights, and may release their dependents before they wait. If a kernel of ours that has released its
// dependents but not ended, or one before it, writes such an argument, that would be a race. So each thread keeps, for
// each stream, the memory that launches may still write, and a launch whose early arguments overlap it goes without the
// attribute: it then begins when all before it has completed.
//
// What is assumed, and how the set follows from it:
//   - Every kernel waits, if it was launched with the attribute, before it ends and before it writes. So when it has
//     completed, so has all before it on the stream.
//   - A record without early reads releases its dependents after it waits. When the next kernel begins, all before
//     that record has completed: the set is its outputs alone.
//   - A record with early reads may release first. The next kernel may begin while the one before is still running:
//     its outputs join the set. Launched without the attribute it began when all before had completed: the set is its
//     outputs alone.
//     The build refuses code that releases first and names no early reads (triton_backend.py).
//   - Kernels that are not ours do not release their dependents before they have written what is read early here. They
//     are not seen, and leave in the set what has completed: at worst a launch goes without the attribute for nothing.
//   - Other streams are ordered by events, which wait for whole kernels. Under graph capture the calls come in the same
//     order, so the edges that are captured are as good.
//     What a stream had to do when a capture on it began has completed before the next launch on it that is not
//     captured: `torch.cuda.graph` synchronises first.
//   - The first launch on a thread and stream finds the set unknown, which overlaps everything; so does a
//     set that was thrown out for another stream's, or has too many ranges. But from then on launches of other threads
//     on the same stream are not seen: synchronise on the host before one thread reads early what another's wrote.
//
// Who may call: launchers, from any thread; a set is its thread's own, and counts for one device: its null stream has
// the same handle on every one. Tables that were loaded without PDL keep no sets.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>

#include "call.h"
#include "check.h"
#include "driver.h"

namespace hdispatch {

/// Addresses of bytes, both inclusive.
struct Range {
  uintptr_t lowest;
  uintptr_t highest;

  bool overlaps(const Range& other) const noexcept { return lowest <= other.highest && other.lowest <= highest; }
  bool operator==(const Range&) const = default;
};

/// From the first to the last byte of a present tensor, gaps included. Strides are not negative; one without elements
/// counts as one with one.
inline Range extent(const TensorView& view) noexcept {
  int64_t last = 0;
  for (uint32_t i = 0; i < view.rank; ++i) last += std::max<int64_t>(view.sizes[i] - 1, 0) * view.strides[i];
  const uintptr_t bytes = kDTypeBytes[static_cast<size_t>(view.dtype)];
  return {view.data, view.data + (static_cast<uintptr_t>(last) + 1) * bytes - 1};
}

/// No less than `extent`, of a tensor whose first dimension's size times stride is no less than its extent in elements.
inline Range extent_by_rows(const TensorView& view) noexcept {
  const uintptr_t bytes = kDTypeBytes[static_cast<size_t>(view.dtype)];
  return {view.data, view.data + static_cast<uintptr_t>(view.sizes[0] * view.strides[0]) * bytes - 1};
}

class PendingWrites {
 public:
  static constexpr uint32_t kRanges = 40;  ///< above kMaxArgs: a launch's outputs always fit an empty set
  static constexpr uint32_t kStreams = 4;  ///< sets per thread

  /// This thread's set for launches on `stream` of the device in that slot, until the thread's next call of this.
  static PendingWrites& of(int device, CUstream stream) noexcept {
    PendingWrites* set = recent_;
    return HD_LIKELY(set->stream_ == stream && set->device_ == device) ? *set : find(device, stream);
  }

  /// All that was launched has completed before what is launched now begins to run.
  void clear() noexcept {
    count_ = 0;
    is_unknown_ = false;
    hull_ = {UINTPTR_MAX, 0};
  }
  /// What may be written is not known: launches that were made are not in the set.
  void forget() noexcept { is_unknown_ = true; }
  /// One more output, of a launch after `clear`.
  void append(const Range& range) noexcept {
    ranges_[count_++] = range;
    hull_ = {std::min(hull_.lowest, range.lowest), std::max(hull_.highest, range.highest)};
  }
  /// One more output, which may be in the set. Outputs come again in the order in which they came: looked for from the
  /// first one on, those of a run of launches that read early took 50 ns a launch.
  void join(const Range& range) noexcept {
    for (uint32_t left = count_, i = next_; left; --left, ++i) {
      if (i >= count_) i = 0;
      if (ranges_[i] == range) {
        next_ = i + 1;
        return;
      }
    }
    if (HD_LIKELY(count_ < kRanges))
      append(range);
    else
      is_unknown_ = true;
  }
  bool overlaps(const Range& range) const noexcept {
    if (HD_LIKELY(!hull_.overlaps(range))) return is_unknown_;  // weights lie apart from what is computed
    bool found = is_unknown_;
    for (uint32_t i = 0; i < count_; ++i) found |= ranges_[i].overlaps(range);
    return found;
  }

 private:
  static PendingWrites& find(int device, CUstream stream) noexcept;

  struct Sets;
  struct Owner;
  static PendingWrites nobody_;
  /// The set of the last call. Constant at start, so that reading it is one load.
  __attribute__((tls_model("initial-exec"))) static constinit thread_local PendingWrites* recent_;

  int device_ = -1;  ///< slot; -1 matches no call
  CUstream stream_ = nullptr;
  uint32_t count_ = 0;
  bool is_unknown_ = true;
  uint32_t next_ = 0;           ///< where the next output is looked for first
  Range hull_{UINTPTR_MAX, 0};  ///< of all ranges
  std::array<Range, kRanges> ranges_{};
};
static_assert(PendingWrites::kRanges > kMaxArgs);

}  // namespace hdispatch
