// sequence_plan.h -- the launches of a sequence for one M: resolved once, patched with a call's addresses, made.
//
// `resolve` looks every step up, tests its guards and fills its parameters, as a call of the op does, and keeps what it
// would launch. A later call with the same M, table and layout of slots only puts its addresses in (`update`) and
// launches. So a launch costs the driver call and a few ns.
//
// What of a step depends on more than addresses is kept with its call and resolved again where that changes: what takes
// an integer slot, what has a TMA descriptor of a slot, and host functions.
//
// Who may call: a plan is one call's at a time. A `TableReader` made before `resolve` or `update` lives until `launch`
// is done: a plan points into its table, and `update` refuses one whose table is not the one that serves.
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "cubin_launcher.h"
#include "runtime.h"
#include "sequence.h"

namespace hdispatch {

class SequencePlan {
 public:
  /// Makes the foreign step of that run; may throw.
  using Foreign = std::function<void(size_t run)>;

  /// Told of every launch and foreign step, for profilers. `end` follows unless something throws or fails.
  class Observer {
   public:
    virtual void begin(size_t run) = 0;
    virtual void end() = 0;

   protected:
    ~Observer() = default;
  };

  /// Why a sequence is not launched as one. Valid as long as the `TableReader`.
  struct Miss {
    uint32_t step = 0;
    Outcome outcome = Outcome::kNoTable;
    Dispatch found;
    Call call{};
    std::string view;  ///< the argument whose view cannot be made of the call's sizes; else empty
  };
  enum class Update : uint8_t { kReady, kOther, kMissed };

  /// `sequence` outlives the plan.
  explicit SequencePlan(const Sequence& sequence) : sequence_(sequence) {}
  SequencePlan(const SequencePlan&) = delete;
  SequencePlan& operator=(const SequencePlan&) = delete;

  /// Makes all launches ready for `stream`; false: nothing is to be launched, and `miss` says why. Without `lock`,
  /// which the caller holds, where a kernel's workspace has to be made. Throws kDriver where there is no memory for
  /// one.
  bool resolve(const SequenceInputs& inputs, CUstream stream, Miss& miss, const CallerLock* lock = nullptr);

  /// Puts another call's addresses and integers in. kOther: this plan does not serve such a call, resolve one that
  /// does.
  Update update(const SequenceInputs& inputs, Miss& miss);

  /// Makes all launches, in order. kLaunched, or what the driver or a function answered to launch number `failed`.
  LaunchResult launch(const Foreign& foreign, size_t& failed, Observer* observer = nullptr);

  /// Throws what a failed launch has left to say; on the thread that launched.
  [[noreturn]] void raise(const LaunchResult& result, size_t failed) const;

  /// The table of the launches; null where there are foreign steps alone, or nothing is resolved.
  const DeviceTable* table() const noexcept { return table_; }
  const std::vector<SequenceRun>& runs() const noexcept { return runs_; }
  /// Whether it can serve again: its table is the one with that generation.
  bool is_of(uint64_t generation) const noexcept { return is_ready_ && (!table_ || generation_ == generation); }

 private:
  enum class Kind : uint8_t { kCubin, kFunction, kForeign };
  /// A call that is resolved again where what it depends on changes, and what it launches.
  struct Kept {
    Call call;
    union {
      CubinLauncher::Block cubin;
      FfiLauncher::Block function;
    };
    Kept() {}  // not initialised: `fill_kept` writes what is read
  };
  struct Launch {
    LaunchConfig config;  ///< kCubin
    CUfunction code;
    void** params;
    const Launcher* launcher;  ///< null: foreign
    Kept* kept;                ///< null: `values_` has the parameters
    uint32_t run;
    uint32_t value;    ///< the first of its parameters in `values_`
    uint32_t ranges;   ///< its first one in `ranges_`
    uint32_t early;    ///< how many from there are read early
    uint32_t outputs;  ///< how many after those are written
    Kind kind;
    bool is_stale;      ///< to be resolved again
    bool may_be_early;  ///< the function of that name's answer
    bool is_noted;      ///< the next launch asks for what this one writes, or is not ours
  };
  struct AddressPatch {  ///< values_[value] = address + offset
    uint32_t value;
    uint64_t offset;
  };
  struct RangePatch {
    uint32_t range;
    uint64_t lowest;
    uint64_t highest;
  };
  /// What follows from a slot's address.
  struct SlotUse {
    std::vector<AddressPatch> addresses;
    std::vector<RangePatch> ranges;
    std::vector<uint32_t> kept;  ///< indices of `launches_`
    uintptr_t mask = 0;          ///< of the address's bits that guards have seen
    bool by_op = false;          ///< an op's argument: its sizes and strides count
  };

  void begin(const SequenceInputs& inputs, CUstream stream);
  bool resolve_run(uint32_t run, const SequenceInputs& inputs, Miss& miss);
  bool look_up(const SequenceRun& run, const SequenceInputs& inputs, Call& call, Miss& miss) const;
  /// Whether a filled launch may begin before what precedes it has completed, and reads early.
  static bool may_be_early(const Launch& launch) noexcept;
  bool fill_kept(Launch& launch, const Launcher& launcher, Miss& miss);
  void keep_values(Launch& launch, const CubinLauncher& launcher, const Call& call, const CubinLauncher::Block& block);
  void add_ranges(Launch& launch, const Call& call);
  void set_ranges(const Launch& launch, const Call& call);
  bool resolve_again(Launch& launch, const SequenceInputs& inputs, Miss& miss);
  void finish();
  bool has_layout(const SequenceInputs& inputs) const noexcept;
  bool is_alone(size_t slot, uintptr_t storage, const SequenceInputs& inputs) const noexcept;
  void move(size_t slot, const TensorView& view) noexcept;
  void note(PendingWrites& pending, const Launch& launch, bool is_early) noexcept;

  const Sequence& sequence_;
  bool is_ready_ = false;
  bool is_mixed_ = false;               ///< steps found rows of two tables
  const DeviceTable* table_ = nullptr;  ///< null: foreign steps alone
  uint64_t generation_ = 0;             ///< of the table
  CUstream stream_ = nullptr;
  const CallerLock* lock_ = nullptr;
  int64_t m_ = 0;
  std::vector<uintptr_t> temps_;
  std::vector<TensorView> slots_;  ///< what the launches are ready for
  std::vector<int64_t> integers_;
  std::vector<uintptr_t> fixed_;  ///< storages of constants, ascending
  std::vector<SequenceRun> runs_;
  std::vector<Launch> launches_;
  std::vector<uint64_t> values_;
  std::vector<void*> params_;
  std::vector<Range> ranges_;
  std::vector<std::unique_ptr<Kept>> kept_;
  std::vector<uint32_t> by_integer_;  ///< indices of `launches_` that take an integer slot
  std::vector<SlotUse> uses_;         ///< by slot
  std::vector<std::pair<const Op*, uint64_t>> hits_;
  std::vector<const Op*> empty_;  ///< of steps without rows
};

/// Describes a call of a sequence, one line a step; launches nothing.
std::string explain(const Sequence& sequence, const SequenceInputs& inputs);

}  // namespace hdispatch
