// fork_mutex.cpp -- the handlers of fork.
#include "fork_mutex.h"

#include <pthread.h>

#include <vector>

namespace hdispatch {
namespace {

/// All mutexes, in the order in which they were made. Never destroyed: a fork may come while the process ends.
std::vector<ForkMutex*>& all() {
  static auto* made = new std::vector<ForkMutex*>;
  return *made;
}

void lock_all() {
  for (ForkMutex* mutex : all()) mutex->lock();
}

void unlock_all() {
  for (auto mutex = all().rbegin(); mutex != all().rend(); ++mutex) (*mutex)->unlock();
}

}  // namespace

ForkMutex::ForkMutex() {
  if (all().empty()) pthread_atfork(&lock_all, &unlock_all, &unlock_all);
  all().push_back(this);
}

}  // namespace hdispatch
