// pending_writes.cpp -- finding a stream's set, and sets with many ranges.
#include "pending_writes.h"

namespace hdispatch {

constinit PendingWrites PendingWrites::nobody_;
constinit thread_local PendingWrites* PendingWrites::recent_ = &PendingWrites::nobody_;

struct PendingWrites::Sets {
  std::array<PendingWrites, kStreams> sets;
  uint32_t next = 0;  ///< to be thrown out
};

/// Frees a thread's sets with it. On the heap: an extension has little room for thread-local data that is found fast.
struct PendingWrites::Owner {
  Sets* sets = nullptr;
  ~Owner() {
    recent_ = &nobody_;
    delete sets;
    sets = nullptr;
  }
};

HD_COLD PendingWrites& PendingWrites::find(int device, CUstream stream) noexcept {
  static thread_local Owner owner;
  if (!owner.sets) owner.sets = new Sets;
  for (PendingWrites& set : owner.sets->sets)
    if (set.device_ == device && set.stream_ == stream) return *(recent_ = &set);
  PendingWrites& set = owner.sets->sets[owner.sets->next++ % kStreams];
  set.device_ = device;
  set.stream_ = stream;
  set.is_unknown_ = true;
  return *(recent_ = &set);
}

}  // namespace hdispatch
