// workspace.cpp -- finding a stream's block, and making one.
#include "workspace.h"

#include <map>
#include <mutex>
#include <tuple>
#include <utility>
#include <vector>

#include "fork_mutex.h"

namespace hdispatch {

constinit thread_local Workspace Workspace::last_;

namespace {

/// CU_STREAM_PER_THREAD: one handle for a stream of each thread.
constexpr uintptr_t kStreamPerThread = 2;

struct Block {
  uintptr_t address = 0;
  uint64_t bytes = 0;
};

using BlockKey = std::tuple<DeviceSlot, CUstream, const void*>;

ForkMutex blocks_mutex;  // guards `blocks` and `outgrown`

/// The largest block of each device and stream. Never destroyed: launches go on while the process ends.
std::map<BlockKey, Block>& blocks() {
  static auto* made = new std::map<BlockKey, Block>;
  return *made;
}

/// Blocks that a larger one has replaced, or another thread's: graphs may hold them, and leak checkers find them here.
std::vector<Block>& outgrown() {
  static auto* made = new std::vector<Block>;
  return *made;
}

/// Relaxes this thread's capture mode until the end of the scope: an allocation would break a capture otherwise.
class RelaxedCapture {
 public:
  explicit RelaxedCapture(const Driver& driver) : driver_(driver) {
    if (driver_.capture_mode_exchange) driver_.capture_mode_exchange(&mode_);
  }
  ~RelaxedCapture() {
    if (driver_.capture_mode_exchange) driver_.capture_mode_exchange(&mode_);
  }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  const Driver& driver_;
  int mode_ = kCaptureModeRelaxed;
};

/// A stream of our own, for the zeros.
class OwnStream {
 public:
  OwnStream(const Driver& driver, const std::string& what) : driver_(driver) {
    HD_DRIVER(driver_, driver_.stream_create(&stream, kStreamNonBlocking), "cuStreamCreate", what);
  }
  ~OwnStream() { driver_.stream_destroy(stream); }
  OwnStream(const OwnStream&) = delete;
  OwnStream& operator=(const OwnStream&) = delete;

  CUstream stream = nullptr;

 private:
  const Driver& driver_;
};

/// Zeroed memory that lasts as long as the process.
uintptr_t make(const Driver& driver, DeviceSlot device, uint64_t bytes) {
  const std::string what =
      text("a workspace of ", bytes, " bytes on ", device == kCpuSlot ? "cpu" : "cuda:" + std::to_string(device - 1));
  const RelaxedCapture relaxed(driver);
  const OwnStream own(driver, what);
  uintptr_t address = 0;
  HD_DRIVER(driver, driver.memory_allocate(&address, bytes), "cuMemAlloc", what);
  CUresult result = driver.memory_zero(address, 0, bytes, own.stream);
  if (result == kCudaSuccess) result = driver.stream_synchronize(own.stream);
  if (result != kCudaSuccess) driver.memory_free(address);
  HD_DRIVER(driver, result, "cuMemsetD8Async", what);
  return address;
}

}  // namespace

HD_COLD uintptr_t Workspace::find(const Driver& driver, DeviceSlot device, CUstream stream, uint64_t bytes) {
  const bool is_per_thread = reinterpret_cast<uintptr_t>(stream) == kStreamPerThread;
  const BlockKey key = {device, stream, is_per_thread ? &last_ : nullptr};
  const auto known = [&key] {
    const std::lock_guard lock(blocks_mutex);
    const auto found = blocks().find(key);
    return found == blocks().end() ? Block{} : found->second;
  };
  Block block = known();
  if (block.bytes < bytes) {
    // Not under the mutex, which a fork takes: the GPU may take its time. Of two threads on one stream that make one at
    // once, each keeps its own: both are zero, and what runs on the stream runs in its order.
    const Block made = {make(driver, device, bytes), bytes};
    const std::lock_guard lock(blocks_mutex);
    Block& kept = blocks()[key];
    Block other = made;
    if (kept.bytes < made.bytes) std::swap(kept, other);
    if (other.bytes) outgrown().push_back(other);
    block = made;
  }
  last_.device_ = device;
  last_.stream_ = stream;
  last_.address_ = block.address;
  last_.bytes_ = block.bytes;
  return block.address;
}

}  // namespace hdispatch
