// cubin_launcher.h -- a record and a call -> argument block on the stack -> cuLaunchKernelEx.
//
// Generic and data-driven: one launcher serves every op and every DSL that yields a cubin. Built at load (`prepare`
// looks the functions up, opts into large shared memory and holds the driver's own parameter sizes against the
// record), then frozen: `launch` is const, allocates nothing, and may run on any number of threads.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "driver.h"
#include "pending_writes.h"
#include "record.h"
#include "tensor_map.h"

namespace hdispatch {

/// Outcome of a launch: kLaunched; or which fact failed; or the driver's answer.
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
};

struct LaunchResult {
  LaunchStatus status;
  int32_t detail;
};

class CubinLauncher {
 public:
  static constexpr uint32_t kMaxParams = 64;      ///< of a kernel, the hidden ones included
  static constexpr uint32_t kMaxTensorMaps = 8;   ///< among them
  static constexpr uint32_t kHiddenPointers = 2;  ///< Triton's global and profile scratch, passed as null

  /// How the launcher gets a function: the cubin and the sizes of its parameters, hidden ones included -> handle.
  using FindFunction = std::function<CUfunction(const Cubin&, const std::vector<uint32_t>& param_bytes)>;

  /// Checks the record's limits (kBundle) and prepares every cubin. `pdl` = false leaves the PDL attribute out.
  CubinLauncher(Record record, const Driver& driver, const FindFunction& find_function, bool pdl = true);

  CubinLauncher(const CubinLauncher&) = delete;  // `codes_` points into `record_` and into itself
  CubinLauncher& operator=(const CubinLauncher&) = delete;

  /// From now on launches keep the set of what is still being written (pending_writes.h), `table` being whose launches
  /// share it. Before the first launch.
  void track(const void* table) noexcept { table_ = table; }

  /// Tests the guards, evaluates grid and parameters, launches. The context of `stream` is current. Without the PDL
  /// attribute where the code would read early what may still be written.
  LaunchResult launch(const Call& call, CUstream stream) const noexcept;

  /// What `launch` refused, in words: the fact and the actual values.
  std::string describe(const LaunchResult& result, const Call& call) const;
  /// The reason alone, without values: what `stats` counts by.
  std::string reason(const LaunchResult& result) const;

  const Record& record() const noexcept { return record_; }

  /// Everything that `launch` hands to the driver, for benchmarks of the bare driver call and for `explain`.
  struct Block {
    LaunchConfig config;
    CUfunction function;
    uint64_t values[kMaxParams];
    void* params[kMaxParams];
    TensorMap maps[kMaxTensorMaps];
  };
  LaunchResult fill(const Call& call, CUstream stream, Block& block) const noexcept;

 private:
  struct Pointer {  ///< a pointer with a constant offset: nearly every pointer
    uint8_t value;  ///< index in Block::values
    uint8_t arg;
    uint16_t param;  ///< index in record_.params
    uint64_t mask;   ///< align - 1
  };
  struct Computed {  ///< any other parameter that is not constant
    uint8_t value;
    uint8_t arg;
    uint16_t param;
    ParamKind kind;
    uint64_t mask;
    const Expr* expr;  ///< null: the float argument itself
  };
  struct Map {  ///< a TMA descriptor
    uint8_t value;
    uint16_t param;
    const TensorMapMaker* maker;
  };
  struct Code {  ///< one class of M, ready to launch
    CUfunction function = nullptr;
    uint32_t cluster = 1;         ///< blocks along the first dimension
    int64_t max_grid_x = 0;       ///< in clusters
    uint32_t dynamic_grid = 0;    ///< bit i: grid dimension i is evaluated per call
    std::vector<uint64_t> start;  ///< what `values` starts from: constants, pointers' offsets, hidden pointers
    std::vector<Pointer> pointers;
    std::vector<Computed> computed;
    std::vector<Map> maps;
    LaunchConfig config{};
    std::array<LaunchAttribute, 4> attributes{};
  };

  void prepare(const Cubin& cubin, Code& code, const Driver& driver, const FindFunction& find_function, bool pdl);
  void add_param(Code& code, uint32_t index) const;
  void add_grid(Code& code) const;
  LaunchResult compute(const Call& call, const Code& code, Block& block) const noexcept;
  LaunchResult make_maps(const Call& call, const Code& code, Block& block) const noexcept;
  bool begins_early(const Call& call, const PendingWrites& pending, LaunchConfig& config) const noexcept;
  template <void (PendingWrites::*Add)(const Range&) noexcept>
  void add_outputs(const Call& call, PendingWrites& pending) const noexcept;
  static void check_params(const Driver& driver, const Code& code, const Cubin& cubin,
                           const std::vector<uint32_t>& param_bytes);

  Record record_;
  LaunchFn launch_;
  const void* table_ = nullptr;                                ///< null: no set is kept
  std::vector<std::unique_ptr<const TensorMapMaker>> makers_;  ///< by param; null for those that are no map
  std::array<Code, kMClasses> codes_;
};

}  // namespace hdispatch
