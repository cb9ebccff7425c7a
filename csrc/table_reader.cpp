// table_reader.cpp -- the list of reading threads, and the barrier.
#include "table_reader.h"

#include <linux/membarrier.h>
#include <pthread.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace hdispatch {

constinit thread_local TableReader::Thread* TableReader::mine_ = nullptr;
constinit std::atomic<uint64_t> TableReader::now_{1};
constinit std::atomic<TableReader::Thread*> TableReader::threads_{nullptr};

namespace {

bool membarrier(int command) noexcept { return syscall(__NR_membarrier, command, 0, 0) == 0; }

}  // namespace

const bool TableReader::has_barrier_ = [] {
  // A reader that was in a table as another thread forked would keep it for ever in the child.
  pthread_atfork(nullptr, nullptr, [] { forget_others(); });
  return membarrier(MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED) && membarrier(MEMBARRIER_CMD_PRIVATE_EXPEDITED);
}();

/// Gives a thread's state back with the thread.
struct TableReader::Membership {
  bool is_member = false;
  ~Membership() {
    if (!is_member || !mine_) return;
    mine_->is_used.store(false, std::memory_order_release);
    mine_ = nullptr;
  }
};

HD_COLD TableReader::Thread& TableReader::join() noexcept {
  static thread_local Membership membership;
  membership.is_member = true;
  for (Thread* thread = threads_.load(std::memory_order_acquire); thread; thread = thread->next) {
    bool is_used = false;
    if (thread->is_used.compare_exchange_strong(is_used, true, std::memory_order_acq_rel)) return *(mine_ = thread);
  }
  // Never freed: `left` walks the list while threads come and go.
  auto* made = new Thread;
  made->next = threads_.load(std::memory_order_relaxed);
  while (!threads_.compare_exchange_weak(made->next, made, std::memory_order_acq_rel)) {
  }
  return *(mine_ = made);
}

bool TableReader::barrier() noexcept { return !has_barrier_ || membarrier(MEMBARRIER_CMD_PRIVATE_EXPEDITED); }

uint64_t TableReader::advance() noexcept {
  const uint64_t epoch = now_.fetch_add(1, std::memory_order_acq_rel) + 1;
  // A barrier that fails although it worked at start: nobody can say who has left, so the table is kept.
  return barrier() ? epoch : UINT64_MAX;
}

bool TableReader::left(uint64_t epoch) noexcept {
  // `advance` could not have a barrier.
  if (epoch == UINT64_MAX) return false;
  for (const Thread* thread = threads_.load(std::memory_order_acquire); thread; thread = thread->next) {
    const uint64_t entered = thread->entered.load(std::memory_order_seq_cst);
    if (entered && entered < epoch) return false;
  }
  return true;
}

/// In a forked child: its other threads are gone, in the middle of a call or not.
void TableReader::forget_others() noexcept {
  for (Thread* thread = threads_.load(std::memory_order_acquire); thread; thread = thread->next) {
    if (thread == mine_) continue;
    thread->entered.store(0, std::memory_order_relaxed);
    thread->is_used.store(false, std::memory_order_relaxed);
  }
}

}  // namespace hdispatch
