// driver.cpp -- finding libcuda, reporting its errors, and doing nothing in its place.
#include "driver.h"

#include <dlfcn.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <mutex>

#include "check.h"
#include "fork_mutex.h"

namespace hdispatch {
namespace {

struct Library {
  Driver driver{};
  std::string missing;
};

template <typename Function>
void resolve(void* handle, Function& function, const char* symbol, std::string* missing) {
  function = reinterpret_cast<Function>(dlsym(handle, symbol));
  if (!function && missing && missing->empty())
    *missing = text("libcuda.so.1 has no ", symbol, ": CUDA 12 or newer is needed");
}

Library open_library() {
  Library library;
  void* handle = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (!handle) {
    library.missing = text("no CUDA driver: ", dlerror());
    return library;
  }
  Driver& d = library.driver;
  std::string* missing = &library.missing;
  d.name = "cuda";
  resolve(handle, d.launch, "cuLaunchKernelEx", missing);
  resolve(handle, d.init, "cuInit", missing);
  resolve(handle, d.driver_version, "cuDriverGetVersion", missing);
  resolve(handle, d.error_name, "cuGetErrorName", missing);
  resolve(handle, d.error_string, "cuGetErrorString", missing);
  resolve(handle, d.device_get, "cuDeviceGet", missing);
  resolve(handle, d.primary_context_retain, "cuDevicePrimaryCtxRetain", missing);
  resolve(handle, d.context_get, "cuCtxGetCurrent", missing);
  resolve(handle, d.context_set, "cuCtxSetCurrent", missing);
  resolve(handle, d.context_push, "cuCtxPushCurrent_v2", missing);
  resolve(handle, d.context_pop, "cuCtxPopCurrent_v2", missing);
  resolve(handle, d.module_load, "cuModuleLoadData", missing);
  resolve(handle, d.module_unload, "cuModuleUnload", missing);
  resolve(handle, d.module_function, "cuModuleGetFunction", missing);
  resolve(handle, d.function_get, "cuFuncGetAttribute", missing);
  resolve(handle, d.function_set, "cuFuncSetAttribute", missing);
  resolve(handle, d.tensor_map_encode, "cuTensorMapEncodeTiled", missing);
  resolve(handle, d.stream_query, "cuStreamQuery", missing);
  resolve(handle, d.stream_is_capturing, "cuStreamIsCapturing", missing);
  resolve(handle, d.capture_mode_exchange, "cuThreadExchangeStreamCaptureMode", missing);
  resolve(handle, d.memory_allocate, "cuMemAlloc_v2", missing);
  resolve(handle, d.memory_free, "cuMemFree_v2", missing);
  resolve(handle, d.memory_zero, "cuMemsetD8Async", missing);
  resolve(handle, d.stream_create, "cuStreamCreate", missing);
  resolve(handle, d.stream_synchronize, "cuStreamSynchronize", missing);
  resolve(handle, d.stream_destroy, "cuStreamDestroy_v2", missing);
  resolve(handle, d.function_param_info, "cuFuncGetParamInfo", nullptr);
  resolve(handle, d.function_load, "cuFuncLoad", nullptr);
  resolve(handle, d.library_kernel_count, "cuLibraryGetKernelCount", nullptr);
  resolve(handle, d.library_kernels, "cuLibraryEnumerateKernels", nullptr);
  resolve(handle, d.kernel_function, "cuKernelGetFunction", nullptr);
  return library;
}

const Library& library() {
  static const Library opened = open_library();
  return opened;
}

}  // namespace

const Driver& cuda_driver() {
  if (!library().missing.empty()) fail(Fault::kDriver, library().missing);
  return library().driver;
}

std::string cuda_driver_missing() { return library().missing; }

void driver_failed(const Driver& driver, CUresult result, const char* call, const std::string& what) {
  const char* name = nullptr;
  const char* words = nullptr;
  driver.error_name(result, &name);
  driver.error_string(result, &words);
  fail(Fault::kDriver, what, ": ", call, " failed with ", result, " ", name ? name : "(unknown)", ": ",
       words ? words : "(no text)");
}

// ---- the null driver ----

namespace {

std::atomic<bool> recording{false};
ForkMutex record_mutex;  // guards `recorded`
std::vector<NullLaunch> recorded;

void record(const LaunchConfig& config, CUfunction function, void** params) {
  const auto& null = *reinterpret_cast<const NullFunction*>(function);
  NullLaunch launch{null.name, null.file, config, {}, {}};
  launch.config.attributes = nullptr;
  launch.attributes.assign(config.attributes, config.attributes + config.attribute_count);
  for (size_t i = 0; i < null.param_bytes.size(); ++i) {
    const auto* bytes = static_cast<const uint8_t*>(params[i]);
    launch.params.emplace_back(bytes, bytes + null.param_bytes[i]);
  }
  null_add(std::move(launch));
}

CUresult null_launch(const LaunchConfig* config, CUfunction function, void** params, void**) {
  if (HD_UNLIKELY(null_recording())) record(*config, function, params);
  return kCudaSuccess;
}

template <typename... Args>
CUresult accept(Args...) {
  return kCudaSuccess;
}

template <typename Out, typename... Args>
CUresult accept_null(Out* out, Args...) {
  *out = Out{};
  return kCudaSuccess;
}

/// The documented rules of cuTensorMapEncodeTiled without interleaving, except those between sizes and strides.
bool is_encodable(int type, uint32_t rank, uintptr_t address, const uint64_t* dims, const uint64_t* strides,
                  const uint32_t* box, const uint32_t* element_strides, int swizzle) {
  constexpr uint64_t kBytes[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};
  if (type < 0 || static_cast<size_t>(type) >= std::size(kBytes) || rank < 1 || rank > kMaxMapRank || address % 16)
    return false;
  for (uint32_t i = 0; i < rank; ++i) {
    if (dims[i] < 1 || dims[i] > uint64_t{1} << 32 || box[i] < 1 || box[i] > 256 || element_strides[i] != 1)
      return false;
    if (i + 1 < rank && (strides[i] % 16 || strides[i] >= uint64_t{1} << 40)) return false;
  }
  const uint64_t inner = box[0] * kBytes[type];
  return swizzle >= 0 && swizzle <= 3 && inner % 16 == 0 && (!swizzle || inner <= uint64_t{16} << swizzle);
}

CUresult null_encode(TensorMap* out, int type, uint32_t rank, void* address, const uint64_t* dims,
                     const uint64_t* strides, const uint32_t* box, const uint32_t* element_strides, int interleave,
                     int swizzle, int l2_promotion, int fill) {
  NullTensorMap map{};
  map.magic = NullTensorMap::kMagic;
  map.address = reinterpret_cast<uintptr_t>(address);
  if (interleave != kMapInterleaveNone || l2_promotion != kMapL2Promotion128 ||
      !is_encodable(type, rank, map.address, dims, strides, box, element_strides, swizzle))
    return kCudaInvalidValue;
  for (uint32_t i = 0; i < rank; ++i) {
    map.dims[i] = dims[i];
    map.box[i] = static_cast<uint16_t>(box[i]);
    if (i + 1 < rank) map.strides[i] = strides[i];
  }
  map.type = static_cast<uint8_t>(type);
  map.rank = static_cast<uint8_t>(rank);
  map.swizzle = static_cast<uint8_t>(swizzle);
  map.fill = static_cast<uint8_t>(fill);
  std::memcpy(out, &map, sizeof map);
  return kCudaSuccess;
}

/// As aligned as the driver's memory.
CUresult null_allocate(uintptr_t* out, size_t bytes) {
  constexpr size_t kAlign = 256;
  *out = reinterpret_cast<uintptr_t>(std::aligned_alloc(kAlign, (bytes + kAlign - 1) / kAlign * kAlign));
  return *out ? kCudaSuccess : kCudaOutOfMemory;
}

CUresult null_free(uintptr_t address) {
  std::free(reinterpret_cast<void*>(address));
  return kCudaSuccess;
}

CUresult null_zero(uintptr_t address, unsigned char value, size_t bytes, CUstream) {
  std::memset(reinterpret_cast<void*>(address), value, bytes);
  return kCudaSuccess;
}

CUresult null_text(CUresult, const char** out) {
  *out = "(null driver)";
  return kCudaSuccess;
}

}  // namespace

const Driver& null_driver() {
  static const Driver driver = {
      .name = "null",
      .launch = null_launch,
      .init = accept<unsigned>,
      .driver_version = accept_null<int>,
      .error_name = null_text,
      .error_string = null_text,
      .device_get = accept_null<CUdevice, int>,
      .primary_context_retain = accept_null<CUcontext, CUdevice>,
      .context_get = accept_null<CUcontext>,
      .context_set = accept<CUcontext>,
      .context_push = accept<CUcontext>,
      .context_pop = accept_null<CUcontext>,
      .module_load = accept_null<CUmodule, const void*>,
      .module_unload = accept<CUmodule>,
      .module_function = accept_null<CUfunction, CUmodule, const char*>,
      .function_get = accept_null<int, int, CUfunction>,
      .function_set = accept<CUfunction, int, int>,
      .tensor_map_encode = null_encode,
      .stream_query = nullptr,
      .stream_is_capturing = nullptr,
      .capture_mode_exchange = nullptr,
      .memory_allocate = null_allocate,
      .memory_free = null_free,
      .memory_zero = null_zero,
      .stream_create = accept_null<CUstream, unsigned>,
      .stream_synchronize = accept<CUstream>,
      .stream_destroy = accept<CUstream>,
      .function_param_info = nullptr,
      .function_load = nullptr,
      .library_kernel_count = nullptr,
      .library_kernels = nullptr,
      .kernel_function = nullptr,
  };
  return driver;
}

void null_record(bool on) {
  const std::lock_guard lock(record_mutex);
  if (on) recorded.clear();
  recording.store(on, std::memory_order_relaxed);
}

bool null_recording() noexcept { return recording.load(std::memory_order_relaxed); }

void null_add(NullLaunch launch) {
  const std::lock_guard lock(record_mutex);
  if (null_recording()) recorded.push_back(std::move(launch));
}

std::vector<NullLaunch> null_launches() {
  const std::lock_guard lock(record_mutex);
  return recorded;
}

}  // namespace hdispatch
