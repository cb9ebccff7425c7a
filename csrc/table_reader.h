// table_reader.h -- which threads read launch tables, and when a table that was replaced may be freed.
//
// Calls read a published table without a lock, and may stay in it for as long as the driver blocks. A writer that takes
// a table away calls `TableReader::advance` and keeps the table until `TableReader::left` says that every reader that
// was there before has gone. Nobody waits: a writer asks again when it next takes a table away.
//
//   reader                                    writer
//   TableReader: entered = now                unpublish the table
//   load the table's pointer                  epoch = advance(): now += 1, then a barrier in every thread
//   …                                         left(epoch): no thread has an `entered` before epoch
//   ~TableReader: entered = none
//
// The barrier (membarrier(2), Linux 4.14) spares readers a fence of 5 ns per call. Where the system has none, readers
// fence.
#pragma once

#include <atomic>
#include <cstdint>

#include "check.h"

namespace hdispatch {

/// This thread reads tables as long as one lives; they nest. Make it before the table's pointer is loaded.
class TableReader {
 public:
  TableReader() noexcept : thread_(HD_LIKELY(mine_ != nullptr) ? *mine_ : join()) {
    outer_ = thread_.entered.load(std::memory_order_relaxed);
    if (HD_LIKELY(!outer_)) {
      const uint64_t now = now_.load(std::memory_order_acquire);
      if (HD_LIKELY(has_barrier_))
        thread_.entered.store(now, std::memory_order_release);
      else
        thread_.entered.exchange(now, std::memory_order_seq_cst);
    }
    asm volatile("" ::: "memory");  // the compiler moves no load of the table before the store
  }
  ~TableReader() { thread_.entered.store(outer_, std::memory_order_release); }
  TableReader(const TableReader&) = delete;
  TableReader& operator=(const TableReader&) = delete;

  /// After a table's pointer was taken away: the epoch from which on no reader finds it.
  static uint64_t advance() noexcept;
  /// Whether every reader that entered before `epoch` has left.
  static bool left(uint64_t epoch) noexcept;

 private:
  /// A thread's state, on a cache line of its own. Never freed; a later thread takes over that of one that ended.
  struct alignas(64) Thread {
    std::atomic<uint64_t> entered{0};  ///< epoch; 0: reads nothing
    std::atomic<bool> is_used{true};
    Thread* next = nullptr;
  };
  struct Membership;
  static Thread& join() noexcept;
  static bool barrier() noexcept;
  static void forget_others() noexcept;

  __attribute__((tls_model("initial-exec"))) static constinit thread_local Thread* mine_;
  static std::atomic<uint64_t> now_;  ///< from 1
  static std::atomic<Thread*> threads_;
  static const bool has_barrier_;

  Thread& thread_;
  uint64_t outer_;
};

}  // namespace hdispatch
