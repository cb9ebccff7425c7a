// cubin_launcher.cpp -- preparing a record's cubins and launching them.
#include "cubin_launcher.h"

#include <bit>
#include <cmath>

#include "check.h"

namespace hdispatch {
namespace {

constexpr int64_t kMaxGridX = 0x7fffffff;
constexpr int64_t kMaxGridYZ = 65535;
constexpr uint32_t kPortableCluster = 8;
constexpr uint32_t kSharedWithoutOptIn = 48 * 1024;

uint64_t float_bits(ParamKind kind, double value) noexcept {
  // The driver copies as many low bytes as the parameter has.
  if (kind == ParamKind::kF64) return std::bit_cast<uint64_t>(value);
  return std::bit_cast<uint32_t>(static_cast<float>(value));
}

bool fits_kind(ParamKind kind, int64_t value) noexcept {
  switch (kind) {
    case ParamKind::kI1:
      return value == 0 || value == 1;
    case ParamKind::kI8:
      return value == static_cast<int8_t>(value);
    case ParamKind::kI16:
      return value == static_cast<int16_t>(value);
    case ParamKind::kI32:
      return value == static_cast<int32_t>(value);
    default:
      return true;
  }
}

}  // namespace

CubinLauncher::CubinLauncher(Record record, const Driver& driver, const FindFunction& find_function, bool pdl)
    : record_(std::move(record)), driver_(driver), launch_(driver.launch) {
  HD_CHECK_BUNDLE(record_.params.size() + kHiddenPointers <= kMaxParams, record_.kernel, ": ", record_.params.size(),
                  " parameters; a record takes at most ", kMaxParams - kHiddenPointers);
  // `record_` stays where it is from here on: the head, and what `add_param` makes, point into it.
  set_head(record_);
  for (const Param& param : record_.params)
    HD_CHECK_BUNDLE(std::has_single_bit(param.align), record_.kernel, ": alignment ", param.align,
                    " is not a power of two");
  for (const Param& param : record_.params)
    makers_.push_back(param.kind == ParamKind::kTensorMap
                          ? std::make_unique<const TensorMapMaker>(record_.kernel, param, driver)
                          : nullptr);
  bool any = false;
  for (uint32_t i = 0; i < kMClasses; ++i) {
    if (record_.cubins[i].file.empty()) continue;  // without a block size, by which `fill` knows it
    any = true;
    prepare(record_.cubins[i], codes_[i], driver, find_function, pdl);
  }
  HD_CHECK_BUNDLE(any, record_.kernel, ": the record has no code");
}

/// Sorts a parameter by what is left to do per call: nothing, adding an address, or evaluating.
void CubinLauncher::add_param(Code& code, uint32_t index) const {
  HD_CHECK_BUNDLE(index < record_.params.size(), record_.kernel, ": code takes param ", index, "; the record has ",
                  record_.params.size());
  const Param& param = record_.params[index];
  const auto value = static_cast<uint8_t>(code.start.size());
  const auto arg = static_cast<uint8_t>(param.arg < 0 ? 0 : param.arg);
  const auto number = static_cast<uint16_t>(index);
  const bool is_float = param.kind == ParamKind::kF32 || param.kind == ParamKind::kF64;
  int64_t constant = 0;
  if (param.kind == ParamKind::kTensorMap) {
    code.maps.push_back({value, number, makers_[index].get()});
    code.start.push_back(0);  // its place among the parameters; `make_maps` points it at the map
    return;
  }
  if (is_float && param.arg < 0) {
    code.start.push_back(float_bits(param.kind, param.constant));
    return;
  }
  if (is_float || !param.value.is_constant()) {
    code.computed.push_back({value, arg, number, param.kind, param.align - 1, is_float ? nullptr : &param.value});
  } else {
    param.value.evaluate(Call{}, constant);
    if (param.kind == ParamKind::kPtr)
      code.pointers.push_back({value, arg, number, param.align - 1});
    else
      HD_CHECK_BUNDLE(fits_kind(param.kind, constant), record_.kernel, ": param ", index, " is ", constant,
                      ", which does not fit ", kParamKindNames[static_cast<size_t>(param.kind)]);
  }
  code.start.push_back(static_cast<uint64_t>(constant));
}

/// Constant dimensions are set once; one that is out of range is left to `fill`, which refuses it.
void CubinLauncher::add_grid(Code& code) const {
  for (uint32_t i = 0; i < 3; ++i) {
    int64_t size = 0;
    const bool set = record_.grid[i].is_constant() && record_.grid[i].evaluate(Call{}, size) && size >= 1 &&
                     size <= (i ? kMaxGridYZ : code.max_grid_x);
    if (set)
      code.config.grid[i] = static_cast<uint32_t>(size) * (i ? 1 : code.cluster);
    else
      code.dynamic_grid |= 1u << i;
  }
}

void CubinLauncher::prepare(const Cubin& cubin, Code& code, const Driver& driver, const FindFunction& find_function,
                            bool pdl) {
  HD_CHECK_BUNDLE(cubin.num_warps >= 1 && cubin.num_warps <= 32, cubin.file, ": ", cubin.num_warps,
                  " warps per block; it takes 1 to 32");
  const uint32_t cluster = cubin.cluster[0] * cubin.cluster[1] * cubin.cluster[2];
  HD_CHECK_BUNDLE(cluster >= 1 && cluster <= 16 && cubin.cluster[1] == 1 && cubin.cluster[2] == 1, cubin.file,
                  ": cluster ", cubin.cluster[0], "x", cubin.cluster[1], "x", cubin.cluster[2],
                  "; it takes 1 to 16 blocks along the first dimension");
  for (size_t i = 0; i < cubin.params.size(); ++i) {
    // With kMaxParams above, this also bounds what `fill` writes.
    HD_CHECK_BUNDLE(i == 0 || cubin.params[i] > cubin.params[i - 1], cubin.file, ": takes param ", cubin.params[i],
                    " after ", cubin.params[i - 1], "; params ascend");
    add_param(code, cubin.params[i]);
  }
  HD_CHECK_BUNDLE(code.maps.size() <= kMaxTensorMaps, cubin.file, ": takes ", code.maps.size(),
                  " tensor maps; a kernel takes at most ", kMaxTensorMaps);
  std::vector<uint32_t> param_bytes;
  for (const uint32_t index : cubin.params)
    param_bytes.push_back(kParamBytes[static_cast<size_t>(record_.params[index].kind)]);
  param_bytes.insert(param_bytes.end(), kHiddenPointers, sizeof(void*));
  code.start.insert(code.start.end(), kHiddenPointers, 0);
  code.function = find_function(cubin, param_bytes);
  code.cluster = cluster;
  code.max_grid_x = kMaxGridX / cluster;
  code.config = {{1, 1, 1}, {32 * cubin.num_warps, 1, 1}, cubin.shared_bytes, nullptr, code.attributes.data(), 0};
  add_grid(code);
  const auto attribute = [&code](LaunchAttributeId id) -> LaunchAttribute& {
    LaunchAttribute& made = code.attributes[code.config.attribute_count++];
    made.id = id;
    return made;
  };
  // The first one, so that `leave_out_pdl` can leave it out.
  if (cubin.pdl && pdl) attribute(kAttributeProgrammaticStreamSerialization).value.flag = 1;
  if (cubin.cooperative) attribute(kAttributeCooperative).value.flag = 1;
  if (cluster > 1) {
    attribute(kAttributeClusterDimension).value.cluster = {cubin.cluster[0], cubin.cluster[1], cubin.cluster[2]};
    attribute(kAttributeClusterSchedulingPolicy).value.flag = 1;  // spread, as Triton asks for
  }
  const std::string what = text(record_.kernel, " (", cubin.file, ")");
  // Loading lazily, on the first launch, would fail under graph capture.
  if (driver.function_load) HD_DRIVER(driver, driver.function_load(code.function), "cuFuncLoad", what);
  // Without being asked the driver gives 48 KiB and refuses a launch that takes more.
  if (cubin.shared_bytes > kSharedWithoutOptIn)
    HD_DRIVER(driver,
              driver.function_set(code.function, kFunctionMaxDynamicSharedBytes, static_cast<int>(cubin.shared_bytes)),
              "cuFuncSetAttribute(MAX_DYNAMIC_SHARED_SIZE_BYTES)", what);
  // More than 8 blocks a cluster are refused unless the driver is told that the code is not portable.
  if (cluster > kPortableCluster)
    HD_DRIVER(driver, driver.function_set(code.function, kFunctionNonPortableCluster, 1),
              "cuFuncSetAttribute(NON_PORTABLE_CLUSTER_SIZE_ALLOWED)", what);
  check_params(driver, code, cubin, param_bytes);
}

/// Compares the sizes that the loaded code declares with the record's: the last defence against ABI drift.
void CubinLauncher::check_params(const Driver& driver, const Code& code, const Cubin& cubin,
                                 const std::vector<uint32_t>& param_bytes) {
  if (!driver.function_param_info) return;
  const size_t count = param_bytes.size();
  for (size_t i = 0; i <= count; ++i) {
    size_t offset = 0;
    size_t bytes = 0;
    const CUresult result = driver.function_param_info(code.function, i, &offset, &bytes);
    if (i == count) {
      HD_CHECK_BUNDLE(result == kCudaInvalidValue, cubin.file, ": the code has more than the ", count,
                      " parameters of its record; rebuild the bundle");
      continue;
    }
    HD_CHECK_BUNDLE(result == kCudaSuccess, cubin.file, ": the code has ", i, " parameters; its record has ", count,
                    "; rebuild the bundle");
    // A parameter of another size moves all behind it: the kernel would read pointers that are none.
    HD_CHECK_BUNDLE(bytes == param_bytes[i], cubin.file, ": parameter ", i, " of the code has ", bytes,
                    " bytes; its record says ", param_bytes[i], "; rebuild the bundle");
  }
}

/// The parameters that are neither constant nor plain pointers.
LaunchResult CubinLauncher::compute(const Call& call, const Code& code, Block& block) const noexcept {
  for (const Computed& item : code.computed) {
    uint64_t& value = block.values[item.value];
    if (!item.expr) {
      value = float_bits(item.kind, call.scalars[item.arg]);
      continue;
    }
    int64_t computed = 0;
    if (HD_UNLIKELY(!item.expr->evaluate(call, computed))) return {LaunchStatus::kParam, item.param};
    value = static_cast<uint64_t>(computed);  // little-endian: the driver copies the low bytes
    if (item.kind == ParamKind::kPtr) {
      value += call.tensors[item.arg].data;
      if (HD_UNLIKELY(value & item.mask)) return {LaunchStatus::kAlign, item.param};
    } else if (HD_UNLIKELY(!fits_kind(item.kind, computed))) {
      return {LaunchStatus::kParam, item.param};
    }
  }
  return {LaunchStatus::kLaunched, 0};
}

/// The parameters that are TMA descriptors.
LaunchResult CubinLauncher::make_maps(const Call& call, const Code& code, Block& block) const noexcept {
  TensorMap* out = block.maps;
  for (const Map& map : code.maps) {
    block.params[map.value] = out;
    if (HD_LIKELY(map.maker->make(call, *out++))) continue;
    const Param& param = record_.params[map.param];
    int64_t offset = 0;
    const bool misaligned = param.value.evaluate(call, offset) &&
                            ((call.tensors[param.arg].data + static_cast<uintptr_t>(offset)) & (param.align - 1));
    return {misaligned ? LaunchStatus::kAlign : LaunchStatus::kMap, map.param};
  }
  return {LaunchStatus::kLaunched, 0};
}

LaunchResult CubinLauncher::fill(const Call& call, CUstream stream, Block& block) const noexcept {
  const int64_t m = call.sizes[kM];
  if (HD_UNLIKELY(m < record_.m_min || m > record_.m_max)) return {LaunchStatus::kMRange, 0};
  const Code& code = codes_[static_cast<size_t>(class_of(m))];
  if (HD_UNLIKELY(!code.config.block[0])) return {LaunchStatus::kClass, 0};
  // 1. guards
  const int32_t failed = record_.failed_guard(call);
  if (HD_UNLIKELY(failed >= 0)) return {LaunchStatus::kGuard, failed};
  // 2. parameters
  const size_t count = code.start.size();
  for (size_t i = 0; i < count; ++i) {
    block.values[i] = code.start[i];
    block.params[i] = &block.values[i];
  }
  for (const Pointer& pointer : code.pointers) {
    uint64_t& value = block.values[pointer.value];
    value += call.tensors[pointer.arg].data;
    if (HD_UNLIKELY(value & pointer.mask)) return {LaunchStatus::kAlign, pointer.param};
  }
  const LaunchResult computed = compute(call, code, block);
  if (HD_UNLIKELY(computed.status != LaunchStatus::kLaunched)) return computed;
  if (HD_UNLIKELY(!code.maps.empty())) {
    const LaunchResult made = make_maps(call, code, block);
    if (made.status != LaunchStatus::kLaunched) return made;
  }
  // 3. grid
  // A copy per call: threads launch one record at once, each on its stream.
  block.config = code.config;
  block.config.stream = stream;
  block.function = code.function;
  for (uint32_t left = code.dynamic_grid; left; left &= left - 1) {
    const auto i = static_cast<uint32_t>(std::countr_zero(left));
    int64_t size = 0;
    if (HD_UNLIKELY(!record_.grid[i].evaluate(call, size) || size < 1 || size > (i ? kMaxGridYZ : code.max_grid_x)))
      return {LaunchStatus::kGrid, static_cast<int32_t>(i)};
    // max_grid_x clusters of blocks do not overflow
    block.config.grid[i] = static_cast<uint32_t>(size) * (i ? 1 : code.cluster);
  }
  return {LaunchStatus::kLaunched, 0};
}

LaunchResult CubinLauncher::launch(const Call& call, CUstream stream) const noexcept {
  return launch_once(*this, call, stream);
}

std::string CubinLauncher::reason(const LaunchResult& result) const {
  const auto index = static_cast<size_t>(result.detail);
  switch (result.status) {
    case LaunchStatus::kClass:
      return "guard: code for this class of M";
    case LaunchStatus::kAlign:
      return text("guard: ", record_.params[index].name, " is ", record_.params[index].align, "-byte aligned");
    case LaunchStatus::kParam:
      return text("guard: param ", index, " fits its type");
    case LaunchStatus::kMap:
      return text("guard: ", record_.params[index].name, " fits a TMA descriptor");
    case LaunchStatus::kGrid:
      return text("guard: grid dimension ", index, " is within the GPU's limits");
    default:
      return common_reason(result);
  }
}

std::string CubinLauncher::describe(const LaunchResult& result, const Call& call) const {
  std::string out = place(result, call);
  const auto index = static_cast<size_t>(result.detail);
  if (result.status == LaunchStatus::kAlign) {
    const Param& param = record_.params[index];
    int64_t offset = 0;
    param.value.evaluate(call, offset);
    const uintptr_t address = call.tensors[param.arg].data + static_cast<uintptr_t>(offset);
    out +=
        text(", its address ", Hex{address}, " is ", address & (param.align - 1), " past a multiple of ", param.align);
  }
  if (result.status == LaunchStatus::kMap) out += ", " + makers_[index]->objection(call);
  return out + ")";
}

std::string CubinLauncher::explain(const Call& call, LaunchResult& result) const {
  Block block;
  result = fill(call, nullptr, block);
  if (result.status != LaunchStatus::kLaunched) return {};
  const auto m_class = static_cast<size_t>(class_of(call.sizes[kM]));
  const Cubin& cubin = record_.cubins[m_class];
  const LaunchConfig& config = block.config;
  return text("class    ", kMClassNames[m_class], "\ncode     ", cubin.function, " in ", cubin.file, "\nlaunch   grid ",
              config.grid[0], "x", config.grid[1], "x", config.grid[2], ", block ", config.block[0], ", shared ",
              config.shared_bytes, " bytes, ", config.attribute_count, " attribute(s)",
              cubin.pdl ? ", waits for its predecessors itself (PDL)" : "", "\nparams   ", cubin.params.size(), " + ",
              kHiddenPointers, " hidden");
}

void CubinLauncher::raise(const LaunchResult& result, const std::string& what) const {
  driver_failed(driver_, result.detail, "cuLaunchKernelEx", what);
}

Reads CubinLauncher::reads() const {
  Reads reads;
  for (const Expr& size : record_.grid) reads.add(size);
  for (const Guard& guard : record_.guards) reads.add(guard.expr);
  for (const Param& param : record_.params) {
    reads.add(param.value);
    for (const Expr& expr : param.map.shape) reads.add(expr);
    for (const Expr& expr : param.map.strides) reads.add(expr);
    const auto arg = static_cast<uint32_t>(param.arg);
    if (param.kind == ParamKind::kPtr || param.kind == ParamKind::kTensorMap) reads.tensors.push_back(arg);
    if ((param.kind == ParamKind::kF32 || param.kind == ParamKind::kF64) && param.arg >= 0) reads.floats.push_back(arg);
  }
  return reads;
}

}  // namespace hdispatch
