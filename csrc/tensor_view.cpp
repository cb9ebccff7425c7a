// tensor_view.cpp -- the dtype map and the current stream.
#include "tensor_view.h"

#include <dlfcn.h>

namespace hdispatch {
namespace {

constexpr auto make_dtypes() {
  std::array<DType, static_cast<size_t>(c10::ScalarType::NumOptions)> map{};
  map.fill(DType::kOther);
  const auto set = [&map](c10::ScalarType type, DType dtype) { map[static_cast<size_t>(type)] = dtype; };
  set(c10::ScalarType::Float, DType::kFloat32);
  set(c10::ScalarType::Double, DType::kFloat64);
  set(c10::ScalarType::Half, DType::kFloat16);
  set(c10::ScalarType::BFloat16, DType::kBFloat16);
  set(c10::ScalarType::Float8_e4m3fn, DType::kFloat8E4M3FN);
  set(c10::ScalarType::Float8_e5m2, DType::kFloat8E5M2);
  set(c10::ScalarType::Char, DType::kInt8);
  set(c10::ScalarType::Byte, DType::kUInt8);
  set(c10::ScalarType::Short, DType::kInt16);
  set(c10::ScalarType::Int, DType::kInt32);
  set(c10::ScalarType::Long, DType::kInt64);
  set(c10::ScalarType::Bool, DType::kBool);
  return map;
}

/// A C function of torch's stable ABI, so that the extension needs no CUDA header and one build serves a CPU and a CUDA
/// torch of the same version.
using GetStream = int (*)(int32_t device, void** stream);

GetStream find_get_stream() {
  void* library = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_LOCAL | RTLD_NOLOAD);
  if (!library) fail(Fault::kInternal, "this torch has no CUDA: a CUDA table cannot have been loaded");
  void* symbol = dlsym(library, "aoti_torch_get_current_cuda_stream");
  if (!symbol) fail(Fault::kInternal, "this torch lacks aoti_torch_get_current_cuda_stream; 2.11 to 2.15 have it");
  return reinterpret_cast<GetStream>(symbol);
}

}  // namespace

const std::array<DType, static_cast<size_t>(c10::ScalarType::NumOptions)> kDTypeOf = make_dtypes();

CUstream current_stream(DeviceSlot slot) {
  if (slot == kCpuSlot) return nullptr;
  static const GetStream get_stream = find_get_stream();
  void* stream = nullptr;
  const int failed = get_stream(static_cast<int32_t>(slot) - 1, &stream);
  HD_CHECK(!failed, "torch has no current stream for cuda:", slot - 1);
  return static_cast<CUstream>(stream);
}

}  // namespace hdispatch
