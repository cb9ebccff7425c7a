// ffi_launcher.h -- a record and a call -> arguments on the stack -> a host function with TVM FFI's ABI.
//
// The function launches kernels itself, on the stream that it is given. It checks its arguments too, but an error of
// its costs 4 to 60 us: what may fail in routine is a guard of the record, an alignment or the key.
#pragma once

#include <string>
#include <vector>

#include "ffi_library.h"
#include "launcher.h"

namespace hdispatch {

class FfiLauncher final : public Launcher {
 public:
  static constexpr uint32_t kMaxFfiArgs = kMaxArgs + 8;  ///< of a function: the op's, the stream, constants
  static constexpr uint32_t kMaxTensors = kMaxArgs + 1;  ///< among them

  /// Checks the record's limits (kBundle). The tensors of its calls live in `slot`. `pdl` = false passes 0 for kPdl.
  FfiLauncher(FfiRecord record, const FfiFunction& function, DeviceSlot slot, bool pdl = true);

  LaunchResult launch(const Call& call, CUstream stream) const noexcept override;
  std::string describe(const LaunchResult& result, const Call& call) const override;
  std::string reason(const LaunchResult& result) const override;
  std::string explain(const Call& call, LaunchResult& result) const override;
  [[noreturn]] void raise(const LaunchResult& result, const std::string& what) const override;
  Reads reads() const override;
  /// A bundle's functions do; one of this process may wait for whatever it likes.
  bool only_launches() const noexcept override { return !record_.file.empty(); }

  const FfiRecord& record() const noexcept { return record_; }
  const FfiFunction& function() const noexcept { return function_; }

  /// Everything that `launch` hands to the function.
  struct Block {
    ffi::Any args[kMaxFfiArgs];
    ffi::Tensor tensors[kMaxTensors];
    int64_t shapes[kMaxTensors][kMaxRank];  ///< of tensors whose dimensions are chosen
    int64_t strides[kMaxTensors][kMaxRank];
  };
  /// Tests the guards and fills the block, which points into `call`.
  LaunchResult fill(const Call& call, CUstream stream, Block& block) const noexcept;
  /// Calls the function with a filled block, with the stream in its environment where the record says so.
  int invoke(const Block& block, CUstream stream) const noexcept;
  LaunchResult fire(const Block& block, CUstream stream) const noexcept {
    const int answer = invoke(block, stream);
    if (HD_UNLIKELY(answer)) return {LaunchStatus::kRaised, answer};
    return {LaunchStatus::kLaunched, 0};
  }

  /// Whether the function's kernels may begin before what precedes them has completed, and read early.
  bool begins_early(const Block& block) const noexcept {
    return !record_.early.empty() && pdl_ >= 0 && block.args[pdl_].integer;
  }
  void leave_out_pdl(Block& block) const noexcept { block.args[pdl_].integer = 0; }
  /// `invoke` of a block that begins early, without PDL this time.
  int invoke_without_pdl(Block& block, CUstream stream) const noexcept {
    block.args[pdl_].integer = 0;
    const int answer = invoke(block, stream);
    block.args[pdl_].integer = 1;
    return answer;
  }

 private:
  struct TensorPlan {
    uint8_t at;  ///< index in Block::args
    uint8_t arg;
    DType dtype;  ///< kNone: the tensor's own
    uintptr_t mask;
    std::vector<uint8_t> dims;  ///< empty: all
  };
  struct ValuePlan {
    uint8_t at;
    uint8_t arg;
    const Expr* expr;  ///< null: the float argument itself
    bool is_flag;
  };

  void add(uint32_t index, bool pdl);

  const FfiRecord record_;
  const FfiFunction function_;
  const ffi::Device device_;
  std::vector<ffi::Any> start_;  ///< what `args` starts from: constants, flags, None
  std::vector<TensorPlan> tensors_;
  std::vector<ValuePlan> values_;
  int stream_ = -1;  ///< index of the stream argument
  int pdl_ = -1;     ///< of the PDL argument
};

/// What the null driver's table calls in the place of a bundle's function; `self` is a NullFunction. Records the call:
/// of a tensor the ffi::Tensor without pointers but `data`, then shape and strides; of anything else the ffi::Any.
int null_function(void* self, const ffi::Any* args, int32_t count, ffi::Any* result);

}  // namespace hdispatch
