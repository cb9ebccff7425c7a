// runtime.h -- what serves calls: the ops, one frozen table per device, the fallback's reasons.
//
// A `DeviceTable` is made from a bundle by `TableBuilder`, which loads every module up front, and then published with
// one atomic store. It is never changed. Publishing another table for the same device replaces it for later calls; the
// old one is freed when its last owner has let go of it and no call is in it (table_reader.h). Code is never unloaded,
// since a captured graph may hold it, but loaded once: tables of one device share modules of one content.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "device_table.h"
#include "fork_mutex.h"
#include "op.h"
#include "table_reader.h"

namespace hdispatch {

/// Why a call was not launched.
enum class Outcome : uint8_t {
  kLaunched,
  kEmpty,        ///< M = 0: there is nothing to do
  kEmptyOutput,  ///< M = 0, but an output does not depend on M: the fallback is to write it
  kBadCall,      ///< an argument is wrong: Op::complain says which
  kUnserved,     ///< nothing is wrong, but no variant has the values that are given: Op::unserved says which
  kNoTable,      ///< no bundle is loaded for the device
  kNoRow,        ///< the table has no such key
  kRefused,      ///< the row's launcher says why in `result`
};

/// What `Runtime::dispatch` found out, kept for the cold path. Valid as long as the `TableReader` that the caller made
/// before.
struct Dispatch {
  const DeviceTable* table = nullptr;
  const Row* row = nullptr;
  Key key;
  LaunchResult result{LaunchStatus::kLaunched, 0};
};

/// A table's context is current on this thread while one lives. For many launches: it asks the driver each time.
class LaunchContext {
 public:
  explicit LaunchContext(const DeviceTable& table) noexcept;
  ~LaunchContext();
  LaunchContext(const LaunchContext&) = delete;
  LaunchContext& operator=(const LaunchContext&) = delete;

 private:
  const DeviceTable& table_;
  const bool pop_;
};

/// A lock that the caller holds, and that other threads may need before the GPU can continue. It is released while a
/// launch may block.
struct CallerLock {
  void* (*release)();
  void (*acquire)(void* state);
};

/// The current stream of a device, as the door knows it. Called once per launch.
using StreamFn = CUstream (*)(DeviceSlot slot);

class Runtime {
 public:
  static Runtime& get();

  /// Defines an op; throws kBundle if the name is taken. The reference lives as long as the process. GIL or no thread
  /// race.
  const Op& define_op(std::string name, std::string schema, std::vector<ArgSpec> args, std::vector<Variant> variants,
                      std::string workspace = {});
  const Op* find_op(std::string_view name) const noexcept;

  /// Serves one call: check, key, probe, guards, launch. The hot path. It may block for as long as the driver does, and
  /// then holds no `lock`. A `TableReader` of the caller's lives.
  /// `lock` is what the caller holds, if anything.
  Outcome dispatch(const Op& op, Call& call, StreamFn stream_of, Dispatch& found,
                   const CallerLock* lock = nullptr) const;

  /// The same without the launch: kLaunched and the row that is to serve the call, or why none does.
  Outcome lookup(const Op& op, Call& call, Dispatch& found) const noexcept;

  /// After `lookup`, for an op that has a workspace: puts the stream's memory into the call. The context of `stream` is
  /// current. Without the caller's lock where it has to wait. `pop`: the context is popped if this throws.
  static void give_workspace(const Op& op, Call& call, const Dispatch& found, CUstream stream, const CallerLock* lock,
                             bool pop);

  /// The reason of an outcome, as counted in `stats`.
  static std::string reason(Outcome outcome, const Dispatch& found);
  /// The same for a person: the shape, the failed fact, the nearest rows, what to do. Not of a failed launch.
  static std::string describe(const Op& op, const Call& call, Outcome outcome, const Dispatch& found);
  /// Throws the error of a launch that was tried and failed (`is_failure`); on the thread that launched.
  [[noreturn]] static void raise_failure(const Op& op, const Call& call, const Dispatch& found);
  /// Describes every step of one call, without launching it.
  std::string explain(const Op& op, Call& call) const;

  /// The table that serves a device, for as long as a `TableReader` that was made before.
  const DeviceTable* table(DeviceSlot slot) const noexcept {
    return slot < kMaxSlots ? tables_[slot].load(std::memory_order_acquire) : nullptr;
  }
  /// Serves the table's device from it, from now on.
  void publish(std::shared_ptr<const DeviceTable> table);
  /// Serves the device from nothing.
  void withdraw(DeviceSlot slot);

  /// The module of that content that a finished table of the device has loaded; null if none has.
  CUmodule find_module(DeviceSlot slot, const std::string& digest) const;
  /// Lets later tables of the device share a module.
  void share_module(DeviceSlot slot, const std::string& digest, CUmodule module);

 private:
  Runtime() = default;
  void replace(DeviceSlot slot, std::shared_ptr<const DeviceTable> table);

  /// A table that was taken away while calls may have been in it.
  struct Retired {
    std::shared_ptr<const DeviceTable> table;
    uint64_t epoch;
  };

  std::vector<std::unique_ptr<Op>> ops_;
  std::array<std::atomic<const DeviceTable*>, kMaxSlots> tables_{};
  std::array<std::shared_ptr<const DeviceTable>, kMaxSlots> owners_;  ///< of what `tables_` points to
  std::vector<Retired> retired_;
  std::map<std::pair<DeviceSlot, std::string>, CUmodule> modules_;  ///< by device and content
};

}  // namespace hdispatch
