// ffi_launcher.cpp -- preparing a record's arguments and calling its function.
#include "ffi_launcher.h"

#include <bit>

#include "check.h"

namespace hdispatch {
namespace {

/// By DType.
constexpr ffi::DataType kDataTypes[] = {
    {},
    {ffi::kCodeFloat, 32, 1},
    {ffi::kCodeFloat, 64, 1},
    {ffi::kCodeFloat, 16, 1},
    {ffi::kCodeBFloat, 16, 1},
    {ffi::kCodeFloat8E4M3FN, 8, 1},
    {ffi::kCodeFloat8E5M2, 8, 1},
    {ffi::kCodeInt, 8, 1},
    {ffi::kCodeUInt, 8, 1},
    {ffi::kCodeInt, 16, 1},
    {ffi::kCodeInt, 32, 1},
    {ffi::kCodeInt, 64, 1},
    {ffi::kCodeBool, 8, 1},
    {},
};
static_assert(std::size(kDataTypes) == kDTypeNames.size());

constexpr ffi::DataType data_type(DType dtype) { return kDataTypes[static_cast<size_t>(dtype)]; }

ffi::Any of_pointer(ffi::TypeIndex type, void* pointer) {
  ffi::Any any{};
  any.type = type;
  any.pointer = pointer;
  return any;
}

ffi::Any of_integer(ffi::TypeIndex type, int64_t value) {
  ffi::Any any{};
  any.type = type;
  any.integer = value;
  return any;
}

ffi::Any of_float(double value) {
  ffi::Any any{};
  any.type = ffi::kTypeFloat;
  any.real = value;
  return any;
}

}  // namespace

FfiLauncher::FfiLauncher(FfiRecord record, const FfiFunction& function, DeviceSlot slot, bool pdl)
    : record_(std::move(record)),
      function_([&] {
        FfiFunction made = function;
        // A function that launches on TVM FFI's current stream is told it around the call; on the CPU there is none.
        if (record_.env_stream && slot != kCpuSlot && !made.set_stream) made.set_stream = find_set_stream();
        if (!record_.env_stream || slot == kCpuSlot) made.set_stream = nullptr;
        return made;
      }()),
      device_(slot == kCpuSlot ? ffi::Device{ffi::kDeviceCpu, 0}
                               : ffi::Device{ffi::kDeviceCuda, static_cast<int32_t>(slot) - 1}) {
  set_head(record_);
  HD_CHECK_BUNDLE(function_.call, record_.kernel, ": there is no function to call");
  HD_CHECK_BUNDLE(record_.args.size() <= kMaxFfiArgs, record_.kernel, ": ", record_.args.size(),
                  " arguments; a function takes at most ", kMaxFfiArgs);
  start_.resize(record_.args.size());
  for (uint32_t i = 0; i < record_.args.size(); ++i) add(i, pdl);
  // `fill` writes into arrays of a block on the stack without asking.
  HD_CHECK_BUNDLE(tensors_.size() <= kMaxTensors, record_.kernel, ": ", tensors_.size(),
                  " tensors; a function takes at most ", kMaxTensors);
  HD_CHECK_BUNDLE(record_.early.empty() || !record_.pdl || pdl_ >= 0, record_.kernel,
                  ": reads before it waits, and has no PDL argument by which it could be told not to");
}

/// Sorts an argument by what is left to do per call: nothing, pointing at the call's tensor, or evaluating.
void FfiLauncher::add(uint32_t index, bool pdl) {
  const FfiArg& arg = record_.args[index];
  const auto at = static_cast<uint8_t>(index);
  const auto from = static_cast<uint8_t>(arg.arg < 0 ? 0 : arg.arg);
  ffi::Any& start = start_[index];
  switch (arg.kind) {
    case FfiArgKind::kTensor:
      HD_CHECK_BUNDLE(std::has_single_bit(arg.align), record_.kernel, ": alignment ", arg.align,
                      " is not a power of two");
      HD_CHECK_BUNDLE(arg.dims.size() <= kMaxRank, record_.kernel, ": ", arg.dims.size(), " dimensions of ", arg.name,
                      "; it takes at most ", kMaxRank);
      start.type = ffi::kTypeTensorPtr;
      tensors_.push_back({at, from, arg.dtype, arg.align - 1, arg.dims});
      return;
    case FfiArgKind::kNone:
      return;
    case FfiArgKind::kInt:
    case FfiArgKind::kBool:
      start.type = arg.kind == FfiArgKind::kBool ? ffi::kTypeBool : ffi::kTypeInt;
      if (arg.value.is_constant())
        arg.value.evaluate(Call{}, start.integer);
      else
        values_.push_back({at, from, &arg.value, arg.kind == FfiArgKind::kBool});
      if (arg.kind == FfiArgKind::kBool) start.integer = start.integer != 0;
      return;
    case FfiArgKind::kFloat:
      start = of_float(arg.constant);
      if (arg.arg >= 0) values_.push_back({at, from, nullptr, false});
      return;
    case FfiArgKind::kString:
      start = of_pointer(ffi::kTypeRawStr, const_cast<char*>(arg.text.c_str()));  // the callee only reads it
      return;
    case FfiArgKind::kStream:
      HD_CHECK_BUNDLE(stream_ < 0, record_.kernel, ": arguments ", stream_, " and ", index, " are both the stream");
      stream_ = static_cast<int>(index);
      start = of_pointer(ffi::kTypeOpaquePtr, nullptr);
      return;
    case FfiArgKind::kPdl:
      HD_CHECK_BUNDLE(pdl_ < 0, record_.kernel, ": arguments ", pdl_, " and ", index, " are both the PDL flag");
      pdl_ = static_cast<int>(index);
      // A launch that would be a race clears it in its own block (`leave_out_pdl`).
      start = of_integer(ffi::kTypeInt, pdl && record_.pdl);
      return;
  }
}

LaunchResult FfiLauncher::fill(const Call& call, CUstream stream, Block& block) const noexcept {
  const int64_t m = call.sizes[kM];
  if (HD_UNLIKELY(m < record_.m_min || m > record_.m_max)) return {LaunchStatus::kMRange, 0};
  const int32_t failed = record_.failed_guard(call);
  if (HD_UNLIKELY(failed >= 0)) return {LaunchStatus::kGuard, failed};
  const size_t count = start_.size();
  // All at once, constants too: one loop without branches, then only what differs is put in.
  for (size_t i = 0; i < count; ++i) block.args[i] = start_[i];
  ffi::Tensor* tensor = block.tensors;
  for (const TensorPlan& plan : tensors_) {
    const TensorView& view = call.tensors[plan.arg];
    if (HD_UNLIKELY(view.data & plan.mask)) return {LaunchStatus::kAlign, plan.at};
    // The callee only reads shape and strides; DLTensor has them without const.
    *tensor = {reinterpret_cast<void*>(view.data),
               device_,
               static_cast<int32_t>(view.rank),
               data_type(plan.dtype == DType::kNone ? view.dtype : plan.dtype),
               const_cast<int64_t*>(view.sizes),
               const_cast<int64_t*>(view.strides),
               0};
    // Some dimensions in another order: the arrays of the call cannot be pointed at.
    if (HD_UNLIKELY(!plan.dims.empty())) {
      const auto at = tensor - block.tensors;
      tensor->rank = static_cast<int32_t>(plan.dims.size());
      tensor->shape = block.shapes[at];
      tensor->strides = block.strides[at];
      for (size_t d = 0; d < plan.dims.size(); ++d) {
        tensor->shape[d] = view.sizes[plan.dims[d]];
        tensor->strides[d] = view.strides[plan.dims[d]];
      }
    }
    block.args[plan.at].pointer = tensor++;
  }
  for (const ValuePlan& plan : values_) {
    ffi::Any& out = block.args[plan.at];
    if (!plan.expr) {
      out.real = call.scalars[plan.arg];
      continue;
    }
    if (HD_UNLIKELY(!plan.expr->evaluate(call, out.integer))) return {LaunchStatus::kParam, plan.at};
    if (plan.is_flag) out.integer = out.integer != 0;
  }
  if (stream_ >= 0) block.args[stream_].pointer = stream;
  return {LaunchStatus::kLaunched, 0};
}

int FfiLauncher::invoke(const Block& block, CUstream stream) const noexcept {
  const auto count = static_cast<int32_t>(start_.size());
  ffi::Any result{};
  int answer = 0;
  if (HD_UNLIKELY(function_.set_stream)) {
    void* before = nullptr;
    function_.set_stream(device_.type, device_.id, stream, &before);
    answer = function_.call(function_.self, block.args, count, &result);
    function_.set_stream(device_.type, device_.id, before, nullptr);
  } else {
    answer = function_.call(function_.self, block.args, count, &result);
  }
  // An object comes with a reference that is ours to drop.
  if (HD_UNLIKELY(result.type >= ffi::kTypeObjectBegin)) drop_result(result);
  return answer;
}

LaunchResult FfiLauncher::launch(const Call& call, CUstream stream) const noexcept {
  return launch_once(*this, call, stream);
}

std::string FfiLauncher::reason(const LaunchResult& result) const {
  const auto index = static_cast<size_t>(result.detail);
  switch (result.status) {
    case LaunchStatus::kAlign:
      return text("guard: ", record_.args[index].name, " is ", record_.args[index].align, "-byte aligned");
    case LaunchStatus::kParam:
      return text("guard: argument ", index, " has a value");
    default:
      return common_reason(result);
  }
}

std::string FfiLauncher::describe(const LaunchResult& result, const Call& call) const {
  std::string out = place(result, call);
  if (result.status == LaunchStatus::kAlign) {
    const FfiArg& arg = record_.args[static_cast<size_t>(result.detail)];
    const uintptr_t address = call.tensors[arg.arg].data;
    out += text(", its address ", Hex{address}, " is ", address & (arg.align - 1), " past a multiple of ", arg.align);
  }
  return out + ")";
}

std::string FfiLauncher::explain(const Call& call, LaunchResult& result) const {
  Block block;
  result = fill(call, nullptr, block);
  if (result.status != LaunchStatus::kLaunched) return {};
  std::string out = text("function ", record_.function, " in ", record_.file.empty() ? "this process" : record_.file,
                         record_.env_stream ? ", stream in TVM FFI's environment" : "", "\nargs    ");
  for (size_t i = 0; i < start_.size(); ++i) {
    const FfiArg& arg = record_.args[i];
    out += i ? ", " : " ";
    switch (arg.kind) {
      case FfiArgKind::kTensor:
        out += arg.name;
        break;
      case FfiArgKind::kNone:
        out += "None";
        break;
      case FfiArgKind::kString:
        out += text("\"", arg.text, "\"");
        break;
      case FfiArgKind::kStream:
        out += "stream";
        break;
      case FfiArgKind::kPdl:
        out += text("PDL ", block.args[i].integer);
        break;
      case FfiArgKind::kFloat:
        out += text(block.args[i].real);
        break;
      default:
        out += text(block.args[i].integer);
    }
  }
  return out;
}

void FfiLauncher::raise(const LaunchResult& result, const std::string& what) const {
  // Taken from the thread, so that a later caller does not find it.
  const FfiError error = take_error(function_);
  // The CUDA driver's and runtime's errors, as CuteDSL's runtime and our shim name them.
  const Fault fault = error.kind.starts_with("CUDA") ? Fault::kDriver : Fault::kFunction;
  fail(fault, what, ": the function ", record_.function, " returned ", result.detail, ", ",
       error.kind.empty() ? "error" : error.kind, ": ", error.message);
}

Reads FfiLauncher::reads() const {
  Reads reads;
  for (const Guard& guard : record_.guards) reads.add(guard.expr);
  for (const FfiArg& arg : record_.args) {
    reads.add(arg.value);
    const auto index = static_cast<uint32_t>(arg.arg);
    if (arg.kind == FfiArgKind::kTensor) reads.tensors.push_back(index);
    for (const uint8_t dimension : arg.dims) reads.dimensions.emplace_back(index, dimension);
    if (arg.kind == FfiArgKind::kFloat && arg.arg >= 0) reads.floats.push_back(index);
  }
  return reads;
}

int null_function(void* self, const ffi::Any* args, int32_t count, ffi::Any*) {
  if (HD_LIKELY(!null_recording())) return 0;
  const auto& function = *static_cast<const NullFunction*>(self);
  NullLaunch launch{function.name, function.file, {}, {}, {}};
  const auto put = [](std::vector<uint8_t>& bytes, const void* from, size_t size) {
    const auto* first = static_cast<const uint8_t*>(from);
    bytes.insert(bytes.end(), first, first + size);
  };
  for (int32_t i = 0; i < count; ++i) {
    std::vector<uint8_t>& bytes = launch.params.emplace_back();
    if (args[i].type != ffi::kTypeTensorPtr) {
      put(bytes, &args[i], sizeof args[i]);
      continue;
    }
    const auto& tensor = *static_cast<const ffi::Tensor*>(args[i].pointer);
    const auto rank = static_cast<size_t>(tensor.rank);
    // Without its pointers to shape and strides, which lie on a stack: what they point to follows.
    put(bytes, &tensor, offsetof(ffi::Tensor, shape));
    put(bytes, tensor.shape, rank * sizeof(int64_t));
    put(bytes, tensor.strides, rank * sizeof(int64_t));
  }
  null_add(std::move(launch));
  return 0;
}

}  // namespace hdispatch
