// launcher.h -- what a row of the launch table points to: something that tests a record's guards and puts it on a
// stream.
//
// There are two kinds: cubins, through the driver (cubin_launcher.h), and host functions with TVM FFI's ABI
// (ffi_launcher.h). Launchers are made when a table is built, then frozen: any number of threads may launch.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "pending_writes.h"
#include "record.h"

namespace hdispatch {

/// Outcome of a launch: kLaunched; or which fact failed; or what the driver or the function answered.
enum class LaunchStatus : uint8_t {
  kLaunched,
  kMRange,  ///< M outside [m_min, m_max]
  kClass,   ///< no code for this class of M
  kGuard,   ///< guard number `detail` is false or has no value
  kAlign,   ///< the pointer of param number `detail` is not aligned
  kParam,   ///< the value of param number `detail` does not exist or does not fit its type
  kMap,     ///< param number `detail` is a TMA descriptor that cannot be
  kGrid,    ///< a grid dimension is below 1 or above the GPU's limit
  kDriver,  ///< `detail` is the CUresult
  kRaised,  ///< the function returned `detail`, and raised an error
};

struct LaunchResult {
  LaunchStatus status;
  int32_t detail;
};

/// The launch was tried and failed: an error to raise, not a reason to fall back.
constexpr bool is_failure(LaunchStatus status) noexcept { return status >= LaunchStatus::kDriver; }

/// The arguments that a record reads, by index. `TableBuilder::add_row` checks that every call of the variant has them.
struct Reads {
  std::vector<uint32_t> tensors;
  std::vector<std::pair<uint32_t, uint32_t>> dimensions;  ///< tensor, dimension
  std::vector<uint32_t> integers;
  std::vector<uint32_t> floats;

  void add(const Expr& expr) {
    expr.each_tensor([this](uint32_t arg, uint32_t dimension) { dimensions.emplace_back(arg, dimension); });
    expr.each_integer([this](uint32_t arg) { integers.push_back(arg); });
  }
};

class Launcher {
 public:
  virtual ~Launcher() = default;
  Launcher(const Launcher&) = delete;
  Launcher& operator=(const Launcher&) = delete;

  /// Makes launches keep the set of pending writes (pending_writes.h) of the device. Before the first launch.
  void track(DeviceSlot slot) noexcept { tracked_ = static_cast<int>(slot); }
  bool is_tracked() const noexcept { return tracked_ >= 0; }

  /// Tests the guards, evaluates the record's expressions, launches. The context of `stream` is current. The launch
  /// goes without PDL if the code would read early what may still be written.
  virtual LaunchResult launch(const Call& call, CUstream stream) const noexcept = 0;

  /// Why `launch` refused, without values: what `stats` counts by.
  virtual std::string reason(const LaunchResult& result) const = 0;
  /// The same with the actual values.
  virtual std::string describe(const LaunchResult& result, const Call& call) const = 0;
  /// What would be launched, in lines; `result` is what `launch` would refuse. Launches nothing.
  virtual std::string explain(const Call& call, LaunchResult& result) const = 0;
  /// Throws the error of a failed launch; `what` names the call. On the thread that launched, which keeps the error.
  [[noreturn]] virtual void raise(const LaunchResult& result, const std::string& what) const = 0;
  virtual Reads reads() const = 0;
  /// Whether a launch waits for nothing but room in the stream's queue. False for a function that may do anything.
  virtual bool only_launches() const noexcept = 0;

  const RecordHead& head() const noexcept { return *head_; }

  /// The bytes of an output that is there.
  static Range written(const Output& output, const TensorView& view) noexcept {
    return HD_LIKELY(output.by_rows) ? extent_by_rows(view) : extent(view);
  }

 protected:
  Launcher() = default;
  /// What the derived class's record begins with; throws kBundle if it is valid for no M.
  void set_head(const RecordHead& head);

  /// `launch` of every kind of launcher: fill a block, give up PDL where it would be a race, fire, note what is
  /// written. `Kind` has Block, fill, begins_early, leave_out_pdl and fire. A template and not virtual steps: the block
  /// is on this stack frame, and the steps are inlined into the one virtual call of a launch.
  template <typename Kind>
  static LaunchResult launch_once(const Kind& launcher, const Call& call, CUstream stream) noexcept {
    typename Kind::Block block;  // not initialised: `fill` writes what is read
    const LaunchResult filled = launcher.fill(call, stream, block);
    if (HD_UNLIKELY(filled.status != LaunchStatus::kLaunched)) return filled;
    PendingWrites* const pending = launcher.pending(stream);
    bool is_early = pending && launcher.begins_early(block);
    if (is_early && HD_UNLIKELY(!launcher.may_begin_early(call, *pending))) {
      launcher.leave_out_pdl(block);
      is_early = false;
    }
    const LaunchResult fired = launcher.fire(block, stream);
    if (HD_UNLIKELY(fired.status != LaunchStatus::kLaunched)) return fired;
    if (pending) launcher.note_writes(call, *pending, is_early);
    return fired;
  }

  /// The reasons that both kinds of launcher have; empty for any other.
  std::string common_reason(const LaunchResult& result) const;
  /// `reason(result)`, where it does not hold.
  std::string place(const LaunchResult& result, const Call& call) const;

 private:
  /// The set for a launch on `stream`; null if none is kept.
  PendingWrites* pending(CUstream stream) const noexcept {
    return tracked_ < 0 ? nullptr : &PendingWrites::of(tracked_, stream);
  }
  /// Whether nothing that the code reads early may still be written.
  bool may_begin_early(const Call& call, const PendingWrites& pending) const noexcept {
    bool found = false;
    for (const uint8_t arg : head_->early) found |= pending.overlaps(extent(call.tensors[arg]));
    return !found;
  }
  /// After a launch: what may be written now. `is_early`: it may have begun before what precedes it had completed.
  void note_writes(const Call& call, PendingWrites& pending, bool is_early) const noexcept {
    if (!is_early) pending.clear();
    for (const Output& output : head_->outputs) {
      const TensorView& view = call.tensors[output.arg];
      if (view.dtype == DType::kNone) continue;
      const Range range = written(output, view);
      is_early ? pending.join(range) : pending.append(range);
    }
  }

  const RecordHead* head_ = nullptr;
  int tracked_ = -1;  ///< device slot; -1: no set is kept
};

}  // namespace hdispatch
