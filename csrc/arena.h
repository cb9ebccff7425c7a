// arena.h -- memory for temporaries of sequences, as torch's allocator gives it.
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

#include <map>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "sequence.h"

namespace hdispatch {

/// Memory for temporaries of sequences: one allocation of torch's per device and stream, made when a sequence first
/// runs there. A sequence that needs more gets a larger one; a smaller one that a plan or a captured graph may know is
/// kept as long as the arena. Or memory that is given, for all streams of its device.
class Arena {
 public:
  Arena() = default;
  /// Throws kCaller unless it is a whole allocation, of bytes.
  explicit Arena(at::Tensor memory);

  /// Which stream; the CPU has none, and a thread stands for one.
  using Lane = std::pair<DeviceSlot, uintptr_t>;

  /// Memory of at least that many bytes, aligned. GIL held.
  const at::Tensor& get(const Lane& lane, size_t bytes);
  /// Held while launches of one call are made: those of two threads on one stream, in turn, would write each other's
  /// temporaries. A foreign step may call a sequence. GIL held; the mutex is waited for without it.
  std::recursive_mutex& turn(const Lane& lane) { return turns_[lane]; }
  /// Bytes of all allocations.
  size_t bytes() const;

 private:
  at::Tensor given_;                              ///< undefined: an allocation per stream
  std::map<Lane, std::vector<at::Tensor>> made_;  ///< the largest last
  std::map<Lane, std::recursive_mutex> turns_;
};

/// Of a torch.Tensor, or None.
std::shared_ptr<Arena> make_arena(const pybind11::object& memory);

/// `bytes` of torch's memory on a device, aligned as temporaries are.
at::Tensor allocate(DeviceSlot device, size_t bytes);

}  // namespace hdispatch
