// launch_queue.h -- whether a launch on a stream may block: the driver's queue of launches holds some thousand.
//
// When that queue is full, cuLaunchKernelEx waits for the GPU. A caller that holds a lock which the GPU's progress may
// need (the GIL: a host function in Python on the stream, say) must not hold it then. But giving the GIL away and
// asking for it again costs 80 to 160 ns a launch (Xeon, H100), and 5 ms beside a busy Python thread. So it is kept
// where the launch is known not to block:
//
//   - A stream whose work has all been done (cuStreamQuery) had an empty queue at that moment.
//   - A launch, by any thread, takes the driver 5,000 cycles, and never fewer than kCycles / kEntries = 1,000. So for
//     kCycles after that moment the queue holds at most kEntries, of some thousand.
//
// The stream is asked once in kCycles (some 60 launches, 0.5 us). Where it is not done, the GPU is behind, host time is
// not what counts, and the caller lets go of its lock for the next launches.
//
// What is assumed: the stream has a queue of its own. With more than CUDA_DEVICE_MAX_CONNECTIONS (8) streams in use,
// streams share queues, and another one's launches may have filled that of a stream that is done.
#pragma once

#if !defined(__x86_64__)
#include <chrono>
#endif
#include <cstdint>

#include "call.h"
#include "check.h"
#include "driver.h"

namespace hdispatch {

/// The processor's time stamp counter; elsewhere nanoseconds, of which a launch takes more than 1,000 too.
inline uint64_t cycles() noexcept {
#if defined(__x86_64__)
  return __builtin_ia32_rdtsc();
#else
  return static_cast<uint64_t>(std::chrono::steady_clock::now().time_since_epoch() / std::chrono::nanoseconds(1));
#endif
}

class LaunchQueue {
 public:
  static constexpr uint64_t kEntries = 400;
  static constexpr uint64_t kCycles = 1000 * kEntries;
  /// Launches between two questions to a stream that is behind, or to one that this thread has just turned to.
  static constexpr uint32_t kPatience = 16;

  /// True if a launch of this thread on the stream will not block. Never blocks itself. The stream's context is
  /// current.
  static bool has_room(const Driver& driver, DeviceSlot device, CUstream stream) noexcept {
    const LaunchQueue& last = last_;
    if (HD_LIKELY(last.stream_ == stream && last.device_ == device && cycles() < last.until_)) return true;
    return ask(driver, device, stream);
  }

 private:
  static bool ask(const Driver& driver, DeviceSlot device, CUstream stream) noexcept;

  /// What this thread knows of the stream that it last launched on.
  __attribute__((tls_model("initial-exec"))) static constinit thread_local LaunchQueue last_;

  CUstream stream_ = nullptr;
  uint64_t until_ = 0;  ///< in cycles
  DeviceSlot device_ = kNoSlot;
  uint32_t patience_ = 0;  ///< launches until the stream is asked again
};

}  // namespace hdispatch
