// launch_queue.cpp -- asking a stream whether its work is done.
#include "launch_queue.h"

#include <cstdlib>

namespace hdispatch {

constinit thread_local LaunchQueue LaunchQueue::last_;

namespace {

/// With CUDA_LAUNCH_BLOCKING every launch waits for its kernel.
bool launches_wait() noexcept {
  static const bool wait = [] {
    const char* value = std::getenv("CUDA_LAUNCH_BLOCKING");
    return value && *value && *value != '0';
  }();
  return wait;
}

/// Whether all work on the stream has been done. False for a stream that is being captured, which must not be asked.
bool is_done(const Driver& driver, CUstream stream) noexcept {
  int status = 0;
  if (driver.stream_is_capturing(stream, &status) != kCudaSuccess || status != kNotCapturing) return false;
  // The question would end another thread's capture, unless this thread says that it is safe: it is another stream's.
  int mode = kCaptureModeRelaxed;
  if (driver.capture_mode_exchange(&mode) != kCudaSuccess) return false;
  const bool done = driver.stream_query(stream) == kCudaSuccess;
  driver.capture_mode_exchange(&mode);
  return done;
}

}  // namespace

HD_COLD bool LaunchQueue::ask(const Driver& driver, DeviceSlot device, CUstream stream) noexcept {
  if (!driver.stream_query) return true;  // the null driver
  LaunchQueue& last = last_;
  if (last.stream_ != stream || last.device_ != device) {
    last.stream_ = stream;
    last.device_ = device;
    last.until_ = 0;
    last.patience_ = kPatience;
    return false;
  }
  if (last.patience_) return --last.patience_, false;
  const uint64_t now = cycles();  // before the question: the time of the answer is not known
  if (launches_wait() || !is_done(driver, stream)) {
    last.patience_ = kPatience;
    return false;
  }
  last.until_ = now + kCycles;
  return true;
}

}  // namespace hdispatch
