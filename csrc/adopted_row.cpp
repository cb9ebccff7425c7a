// adopted_row.cpp -- preparing and launching what Triton compiled.
#include "adopted_row.h"

#include <bit>
#include <chrono>

#include "launch_queue.h"
#include "pending_writes.h"

namespace hdispatch {
namespace {

/// Triton's global and profile scratch: two pointers after the parameters, null where the code needs none.
constexpr size_t kHiddenPointers = 2;

/// Rounded toward zero, as Triton's launcher does.
uint64_t to_bf16(double value) noexcept { return std::bit_cast<uint32_t>(static_cast<float>(value)) >> 16; }

uint64_t to_f32(double value) noexcept { return std::bit_cast<uint32_t>(static_cast<float>(value)); }

uint64_t convert(Conversion conversion, uint64_t value) noexcept {
  const auto integer = static_cast<double>(static_cast<int64_t>(value));
  switch (conversion) {
    case Conversion::kFloatToF32:
      return to_f32(std::bit_cast<double>(value));
    case Conversion::kFloatToBF16:
      return to_bf16(std::bit_cast<double>(value));
    case Conversion::kIntToF32:
      return to_f32(integer);
    case Conversion::kIntToBF16:
      return to_bf16(integer);
    case Conversion::kIntToF64:
      return std::bit_cast<uint64_t>(integer);
    default:
      return value;
  }
}

}  // namespace

AdoptedRow::AdoptedRow(const AdoptedCode& code, const LaunchPlace& place)
    : place_(place), function_(code.function), cluster_(code.cluster), releases_(code.pdl || code.releases) {
  HD_CHECK_BUNDLE(code.params.size() + kHiddenPointers <= kMaxParams, code.name, ": ", code.params.size(),
                  " parameters; an adopted kernel takes at most ", kMaxParams - kHiddenPointers);
  for (const AdoptedParam& param : code.params) {
    arguments_.push_back(param.argument);
    if (param.conversion != Conversion::kNone) converted_.push_back({param.argument, param.conversion});
  }
  if (place_.slot == kCpuSlot) {
    null_function_ = std::make_unique<NullFunction>(NullFunction{code.name, "(adopted)", {}});
    for (const AdoptedParam& param : code.params) null_function_->param_bytes.push_back(param.bytes);
    null_function_->param_bytes.insert(null_function_->param_bytes.end(), kHiddenPointers, sizeof(void*));
    function_ = reinterpret_cast<CUfunction>(null_function_.get());
  }
  config_ = {{1, 1, 1}, {32 * code.num_warps, 1, 1}, code.shared_bytes, nullptr, attributes_.data(), 0};
  const auto attribute = [this](LaunchAttributeId id) -> LaunchAttribute& {
    LaunchAttribute& made = attributes_[config_.attribute_count++];
    made.id = id;
    return made;
  };
  // Triton's order.
  if (code.pdl) attribute(kAttributeProgrammaticStreamSerialization).value.flag = 1;
  if (code.cooperative) attribute(kAttributeCooperative).value.flag = 1;
  if (code.cluster > 1) {
    attribute(kAttributeClusterDimension).value.cluster = {code.cluster, 1, 1};
    attribute(kAttributeClusterSchedulingPolicy).value.flag = 1;  // spread
  }
  check_params(code);
}

/// The last defence against another calling convention than the one that is known here.
void AdoptedRow::check_params(const AdoptedCode& code) const {
  if (place_.slot == kCpuSlot || !place_.driver->function_param_info) return;
  const size_t count = code.params.size() + kHiddenPointers;
  for (size_t i = 0; i <= count; ++i) {
    size_t offset = 0;
    size_t bytes = 0;
    const CUresult result = place_.driver->function_param_info(function_, i, &offset, &bytes);
    if (i == count) {
      HD_CHECK_BUNDLE(result == kCudaInvalidValue, code.name, ": the code has more than ", count, " parameters");
      continue;
    }
    HD_CHECK_BUNDLE(result == kCudaSuccess, code.name, ": the code has ", i, " parameters, not ", count);
    const size_t wanted = i < code.params.size() ? code.params[i].bytes : sizeof(void*);
    HD_CHECK_BUNDLE(bytes == wanted, code.name, ": parameter ", i, " has ", bytes, " bytes, not ", wanted);
  }
}

bool AdoptedRow::has_room(CUstream stream) const noexcept {
  return LaunchQueue::has_room(*place_.driver, place_.slot, stream);
}

void AdoptedRow::fill(uint64_t* values, void** params) const noexcept {
  static uint64_t no_scratch = 0;
  for (const Converted& each : converted_) values[each.argument] = convert(each.conversion, values[each.argument]);
  size_t count = 0;
  for (const uint16_t argument : arguments_) params[count++] = &values[argument];
  for (size_t i = 0; i < kHiddenPointers; ++i) params[count++] = &no_scratch;
}

double AdoptedRow::bench_ns(uint64_t* values, const std::array<uint32_t, 3>& grid, CUstream stream,
                            uint32_t count) const {
  void* params[kMaxParams];
  fill(values, params);
  CUresult result = kCudaSuccess;
  const auto begin = std::chrono::steady_clock::now();
  for (uint32_t i = 0; i < count; ++i) result |= put(params, grid, stream);
  const std::chrono::duration<double, std::nano> taken = std::chrono::steady_clock::now() - begin;
  HD_DRIVER(*place_.driver, result, "cuLaunchKernelEx", "an adopted kernel");
  return taken.count() / count;
}

CUresult AdoptedRow::put(void** params, const std::array<uint32_t, 3>& grid, CUstream stream) const noexcept {
  LaunchConfig config = config_;
  config.grid[0] = grid[0] * cluster_;
  config.grid[1] = grid[1];
  config.grid[2] = grid[2];
  config.stream = stream;
  return place_.driver->launch(&config, function_, params, nullptr);
}

/// Once more in the row's context, where another one is current: the driver refuses functions of one in another.
HD_COLD static CUresult again_in_context(const LaunchPlace& place, CUresult failed, const auto& put) noexcept {
  CUcontext current = nullptr;
  place.driver->context_get(&current);
  if (current == place.context || place.driver->context_push(place.context) != kCudaSuccess) return failed;
  forget_context();
  const CUresult result = put();
  place.driver->context_pop(&current);
  return result;
}

CUresult AdoptedRow::launch(uint64_t* values, const std::array<uint32_t, 3>& grid, CUstream stream) const noexcept {
  void* params[kMaxParams];
  fill(values, params);
  const bool pop = HD_UNLIKELY(needs_entering(place_)) && enter(place_);
  CUresult result = put(params, grid, stream);
  if (HD_UNLIKELY(result != kCudaSuccess))
    result = again_in_context(place_, result, [&] { return put(params, grid, stream); });
  if (HD_UNLIKELY(pop)) {
    CUcontext popped = nullptr;
    place_.driver->context_pop(&popped);
  }
  // The next kernel may begin before what this one writes has been written, and that is not known here.
  if (HD_UNLIKELY(releases_)) PendingWrites::of(static_cast<int>(place_.slot), stream).forget();
  return result;
}

std::string AdoptedRow::describe() const {
  return text("block ", config_.block[0], ", shared ", config_.shared_bytes, " bytes, cluster ", cluster_, ", ",
              config_.attribute_count, " attribute(s), ", arguments_.size(), " parameter(s)");
}

}  // namespace hdispatch
