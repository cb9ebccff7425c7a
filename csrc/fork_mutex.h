// fork_mutex.h -- a mutex that a forked child can go on using.
//
// A fork copies one thread. A mutex that another thread held would stay locked in the child, and what it guards
// half-written. So a handler of fork takes every `ForkMutex` before the fork and releases it on both sides after it.
//
// Static objects only: a ForkMutex is never destroyed before the process ends. Nobody takes two of them at once, or
// takes the GIL while holding one: fork takes them with the GIL held.
#pragma once

#include <mutex>

namespace hdispatch {

class ForkMutex {
 public:
  ForkMutex();
  ForkMutex(const ForkMutex&) = delete;
  ForkMutex& operator=(const ForkMutex&) = delete;

  void lock() { mutex_.lock(); }
  void unlock() { mutex_.unlock(); }

 private:
  std::mutex mutex_;
};

}  // namespace hdispatch
