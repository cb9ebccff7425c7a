// workspace.h -- memory that the runtime owns, one block per device and stream: partial results and counters of
// kernels.
//
// A kernel that splits its work leaves partial results, and counts who is done, in memory that no argument of the call
// holds. All launches on one stream share its block, since they run in the stream's order; each finds it as the last
// one left it: zero before the first. Its first 64 KiB are counters, which every kernel leaves at zero
// (opspec.py, WorkspaceArg). Two streams have two blocks.
//
//   - A block is allocated and zeroed at the first launch that needs it, or one that needs a larger one. That works
//     while the stream is being captured: this thread's capture mode is relaxed meanwhile, the zeros are written on a
//     stream of our own and waited for, so that nothing of it becomes part of the graph.
//   - No block is ever freed: a captured graph, or a launch that still runs, may hold its address. Memory is bound by
//     (streams that launched such ops) x (the sum of the distinct sizes that their ops ask for); a process makes few
//     streams, and torch hands out 32 of each priority again and again.
//   - A kernel that writes it waits for its predecessors first (griddepcontrol.wait) and is among what the launch
//     writes (pending_writes.h).
//
// What is assumed: a graph that was captured on a stream is not replayed while other launches that were made, or
// captured, on that same stream run: as with the memory pool of a graph. A stream's handle is not given to a new stream
// while launches on the old one still run.
#pragma once

#include <cstdint>

#include "call.h"
#include "check.h"
#include "driver.h"

namespace hdispatch {

class Workspace {
 public:
  static constexpr uint64_t kAlign = 256;  ///< of a block's address

  /// Address of at least `bytes` bytes for launches on `stream` of the device, whose context is current. Throws
  /// kDriver where there is no memory. Any thread. May wait for the GPU where `has` is false.
  static uintptr_t get(const Driver& driver, DeviceSlot device, CUstream stream, uint64_t bytes) {
    const Workspace& last = last_;
    if (HD_LIKELY(last.is_for(device, stream, bytes))) return last.address_;
    return find(driver, device, stream, bytes);
  }
  /// Whether `get` on this thread would return at once.
  static bool has(DeviceSlot device, CUstream stream, uint64_t bytes) noexcept {
    return last_.is_for(device, stream, bytes);
  }

 private:
  bool is_for(DeviceSlot device, CUstream stream, uint64_t bytes) const noexcept {
    return stream_ == stream && device_ == device && bytes <= bytes_;
  }
  static uintptr_t find(const Driver& driver, DeviceSlot device, CUstream stream, uint64_t bytes);

  /// The block of this thread's last launch that needed one.
  __attribute__((tls_model("initial-exec"))) static constinit thread_local Workspace last_;

  CUstream stream_ = nullptr;
  DeviceSlot device_ = kNoSlot;
  uintptr_t address_ = 0;
  uint64_t bytes_ = 0;
};

}  // namespace hdispatch
