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
#include <span>
#include <string>
#include <vector>

#include "cubin_launcher.h"
#include "ffi_launcher.h"
#include "fork_mutex.h"
#include "ladder.h"
#include "launch_place.h"
#include "launch_table.h"
#include "op.h"
#include "table_reader.h"

namespace hdispatch {

/// Bits of the key for the kind of device; one table serves one device, so one class suffices until tables are shared.
inline constexpr uint16_t kDeviceClass = 0;

/// How the rows of one op are found: its ladders, and which sizes of the key its rows leave open.
struct OpRows {
  const Op* op = nullptr;
  int second_arg = -1;      ///< the integer argument that has a ladder; -1: the op has none
  uint32_t mask_count = 0;  ///< 1 for an op whose rows are all exact
  /// For the key's second word, K and N: the most exact first. A row with K = 0 serves every K.
  std::array<uint64_t, 4> masks{};
  Ladder ladder;  ///< of M; size 0 for ops that the bundle has not
  Ladder second;  ///< of the integer argument that has one

  static_assert(Ladder::kMaxBuckets * Ladder::kMaxBuckets <= 0x10000, "a key has 16 bits for the bucket");
  uint32_t buckets() const noexcept { return ladder.size() * (second_arg < 0 ? 1 : second.size()); }
  /// The bucket of both ladders, of an op that has two.
  uint32_t with_second(uint32_t bucket_of_m, int64_t integer) const noexcept {
    return bucket_of_m * second.size() + second.bucket(integer);
  }
};

struct DeviceTable : LaunchPlace {
  uint64_t generation = 0;  ///< of no other table, also of none before; not 0
  std::vector<OpRows> ops;  ///< by op id
  LaunchTable table;
  std::vector<std::unique_ptr<Launcher>> launchers;
  std::vector<std::unique_ptr<NullFunction>> null_functions;
  std::shared_ptr<const DeviceTable> base;  ///< the table that this one extends: its rows point to that one's launchers

  /// The rows of an op; null if the table has none.
  const OpRows* rows_of(const Op& op) const noexcept {
    return op.id() < ops.size() && ops[op.id()].ladder.size() ? &ops[op.id()] : nullptr;
  }
  /// The row that serves a key: an exact one, else one that leaves K or N open.
  const Row* find(const OpRows& rows, const Key& key) const noexcept {
    for (uint32_t i = 0; i < rows.mask_count; ++i)
      if (const Row* row = table.find({key.word0, key.word1 & rows.masks[i]})) return row;
    return nullptr;
  }
};

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

/// A lock of the caller's that others may need before the GPU goes on: let go of while a launch may block.
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
  /// The same for a person: the shape, the failed fact, the nearest rows, what to do.
  static std::string describe(const Op& op, const Call& call, Outcome outcome, const Dispatch& found);
  /// Every step of one call in words, without launching.
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

/// Makes one device's table. All or nothing: until `publish` nothing is served, and a builder that is abandoned before
/// `finish` unloads.
class TableBuilder {
 public:
  /// `device` is a CUDA device index, or -1 for the null driver, which serves CPU tensors. `pdl` = false: plain
  /// launches. `early_reads` = false: plain launches of what reads before it waits, so that it never does.
  TableBuilder(int device, int device_count, bool pdl, bool early_reads = true);
  ~TableBuilder();
  TableBuilder(const TableBuilder&) = delete;
  TableBuilder& operator=(const TableBuilder&) = delete;

  /// Begins with the ladders and rows of a finished table of the same device; rows of the same key take their place.
  void extend(std::shared_ptr<const DeviceTable> base);

  /// `second`: edges of the op's integer argument with a ladder; empty where it has none.
  void set_ladder(const Op& op, const std::vector<int64_t>& edges, const std::vector<int64_t>& second = {});
  /// Loads a cubin's image under its file name. `digest` names its content: the module of a finished table with the
  /// same one is shared. Empty: it is loaded for this table alone.
  void add_module(const std::string& file, std::span<const char> image, const std::string& digest = {});
  /// Opens a shared library's image under its file name; the null driver only notes it.
  void add_library(const std::string& file, std::span<const char> image);
  uint32_t add_record(Record record);
  /// A function of a library that was added.
  uint32_t add_record(FfiRecord record);
  /// A function of this process. It is called with the null driver too.
  uint32_t add_record(FfiRecord record, const FfiFunction& function);
  void add_row(const Op& op, uint16_t variant, int64_t k, int64_t n, uint32_t bucket, uint32_t record);
  /// The table, frozen, but not published yet.
  std::shared_ptr<const DeviceTable> finish();
  void publish() { Runtime::get().publish(finish()); }

 private:
  uint32_t add_launcher(std::unique_ptr<Launcher> launcher);
  CUfunction find_function(const Cubin& cubin, const std::vector<uint32_t>& param_bytes);
  void set_masks();

  const Driver& driver_;
  bool pdl_;
  bool early_reads_;
  std::unique_ptr<DeviceTable> made_;
  struct Module {
    CUmodule handle;
    std::string digest;
    bool is_shared;  ///< with a table that is finished: not ours to unload
  };
  bool starts_early(const RecordHead& record) const noexcept { return pdl_ && (early_reads_ || record.early.empty()); }
  std::map<std::string, Module> modules_;
  std::map<std::string, const FfiLibrary*> libraries_;  ///< null with the null driver
  std::vector<Row> base_;
  std::vector<Row> rows_;
};

}  // namespace hdispatch
