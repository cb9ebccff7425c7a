// cubin_launcher.h -- a record and a call -> argument block on the stack -> cuLaunchKernelEx.
//
// Generic and data-driven: one launcher serves every op and every DSL that yields a cubin. Built at load (`prepare`
// looks the functions up, opts into large shared memory and compares the driver's own parameter sizes with the
// record's), then frozen: `launch` is const, allocates nothing, and may run on any number of threads.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "driver.h"
#include "launcher.h"
#include "tensor_map.h"

namespace hdispatch {

/// Takes the PDL attribute from a launch that has it: `prepare` puts it first.
inline void leave_out_pdl(LaunchConfig& config) noexcept {
  ++config.attributes;
  --config.attribute_count;
}

class CubinLauncher final : public Launcher {
 public:
  static constexpr uint32_t kMaxParams = 64;      ///< of a kernel, the hidden ones included
  static constexpr uint32_t kMaxTensorMaps = 8;   ///< among them
  static constexpr uint32_t kHiddenPointers = 2;  ///< Triton's global and profile scratch, passed as null

  /// How the launcher gets a function: the cubin and the sizes of its parameters, hidden ones included -> handle.
  using FindFunction = std::function<CUfunction(const Cubin&, const std::vector<uint32_t>& param_bytes)>;

  /// Checks the record's limits (kBundle) and prepares every cubin. `pdl` = false leaves the PDL attribute out.
  CubinLauncher(Record record, const Driver& driver, const FindFunction& find_function, bool pdl = true);

  LaunchResult launch(const Call& call, CUstream stream) const noexcept override;
  std::string describe(const LaunchResult& result, const Call& call) const override;
  std::string reason(const LaunchResult& result) const override;
  std::string explain(const Call& call, LaunchResult& result) const override;
  [[noreturn]] void raise(const LaunchResult& result, const std::string& what) const override;
  Reads reads() const override;
  bool only_launches() const noexcept override { return true; }

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
  /// Hands a filled block to the driver; `fill` has put the stream into it.
  LaunchResult fire(Block& block, CUstream) const noexcept {
    const CUresult answer = launch_(&block.config, block.function, block.params, nullptr);
    if (HD_UNLIKELY(answer != kCudaSuccess)) return {LaunchStatus::kDriver, answer};
    return {LaunchStatus::kLaunched, 0};
  }
  /// Whether the kernel may begin before what precedes it has completed, and reads early.
  bool begins_early(const LaunchConfig& config) const noexcept {
    return !record_.early.empty() && config.attribute_count &&
           config.attributes->id == kAttributeProgrammaticStreamSerialization;
  }
  bool begins_early(const Block& block) const noexcept { return begins_early(block.config); }
  static void leave_out_pdl(Block& block) noexcept { hdispatch::leave_out_pdl(block.config); }

  /// Of a block that `fill` made for M: the number of its values.
  size_t count_values(int64_t m) const noexcept { return codes_[static_cast<size_t>(class_of(m))].start.size(); }
  /// Whether it has TMA descriptors.
  bool has_maps(int64_t m) const noexcept { return !codes_[static_cast<size_t>(class_of(m))].maps.empty(); }
  /// Calls visit(index in Block::values, tensor argument, mask of its alignment) for every address among its values.
  template <typename Visit>
  void each_address(int64_t m, Visit visit) const {
    const Code& code = codes_[static_cast<size_t>(class_of(m))];
    for (const Pointer& pointer : code.pointers) visit(pointer.value, pointer.arg, pointer.mask);
    for (const Computed& item : code.computed)
      if (item.kind == ParamKind::kPtr) visit(item.value, item.arg, item.mask);
  }

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
  static void check_params(const Driver& driver, const Code& code, const Cubin& cubin,
                           const std::vector<uint32_t>& param_bytes);

  const Record record_;  // `codes_` points into it
  const Driver& driver_;
  LaunchFn launch_;
  std::vector<std::unique_ptr<const TensorMapMaker>> makers_;  ///< by param; null for those that are no map
  std::array<Code, kMClasses> codes_;
};

}  // namespace hdispatch
