// driver.h -- the CUDA driver's entry points, resolved once with dlopen, and the null driver that stands in for them.
//
// The only file that knows libcuda. Building needs no CUDA toolkit: the few types of the driver's ABI are declared here
// and compared with cuda.h, where there is one, in tests/core/test_driver_abi.cpp.
//
// A `Driver` is a table of functions with the driver's own signatures. The null driver accepts everything, launches
// nothing and, on request, records the launches: everything but the GPU's work runs on a machine without one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace hdispatch {

// ---- the driver's ABI ----

using CUresult = int;
using CUdevice = int;
using CUcontext = struct CUctx_st*;
using CUmodule = struct CUmod_st*;
using CUfunction = struct CUfunc_st*;
using CUstream = struct CUstream_st*;
using CUlibrary = struct CUlib_st*;
using CUkernel = struct CUkern_st*;

inline constexpr CUresult kCudaSuccess = 0;
inline constexpr CUresult kCudaInvalidValue = 1;
inline constexpr CUresult kCudaOutOfMemory = 2;
inline constexpr int kNotCapturing = 0;        ///< CU_STREAM_CAPTURE_STATUS_NONE
inline constexpr int kCaptureModeRelaxed = 2;  ///< CU_STREAM_CAPTURE_MODE_RELAXED
inline constexpr unsigned kStreamNonBlocking = 1;

/// CUlaunchAttribute: an id and a 64-byte union, of which only these members are used.
struct LaunchAttribute {
  uint32_t id = 0;
  char pad[4] = {};
  union {
    char bytes[64];
    int32_t flag;
    struct {
      uint32_t x, y, z;
    } cluster;
  } value = {};
};
static_assert(sizeof(LaunchAttribute) == 72);

enum LaunchAttributeId : uint32_t {
  kAttributeCooperative = 2,
  kAttributeClusterDimension = 4,
  kAttributeClusterSchedulingPolicy = 5,
  kAttributeProgrammaticStreamSerialization = 6,
};

/// CUlaunchConfig
struct LaunchConfig {
  uint32_t grid[3];
  uint32_t block[3];
  uint32_t shared_bytes;
  CUstream stream;
  const LaunchAttribute* attributes;
  uint32_t attribute_count;
};
static_assert(sizeof(LaunchConfig) == 56 && offsetof(LaunchConfig, stream) == 32);

enum FunctionAttribute : int {
  kFunctionSharedBytes = 1,
  kFunctionMaxDynamicSharedBytes = 8,
  kFunctionNonPortableCluster = 14,
};

/// CUtensorMap: what a TMA descriptor says, in a form that only the driver and the GPU know.
struct alignas(64) TensorMap {
  uint64_t words[16];
};
static_assert(sizeof(TensorMap) == 128);

/// CUtensorMapDataType
enum TensorMapType : int {
  kMapUInt8,
  kMapUInt16,
  kMapUInt32,
  kMapInt32,
  kMapUInt64,
  kMapInt64,
  kMapFloat16,
  kMapFloat32,
  kMapFloat64,
  kMapBFloat16,
  kMapFloat32Ftz,
  kMapTFloat32,
  kMapTFloat32Ftz,
};

/// Further constants of cuTensorMapEncodeTiled. Its swizzles of 0, 32, 64 and 128 bytes are 0, 1, 2, 3.
enum TensorMapConstant : int { kMapInterleaveNone = 0, kMapL2Promotion128 = 2, kMapFillZero = 0, kMapFillNan = 1 };
inline constexpr uint32_t kMaxMapRank = 5;

using LaunchFn = CUresult (*)(const LaunchConfig*, CUfunction, void** params, void** extra);

struct Driver {
  const char* name;  ///< "cuda" or "null"
  LaunchFn launch;
  CUresult (*init)(unsigned);
  CUresult (*driver_version)(int*);
  CUresult (*error_name)(CUresult, const char**);
  CUresult (*error_string)(CUresult, const char**);
  CUresult (*device_get)(CUdevice*, int);
  CUresult (*primary_context_retain)(CUcontext*, CUdevice);
  CUresult (*context_get)(CUcontext*);
  CUresult (*context_set)(CUcontext);
  CUresult (*context_push)(CUcontext);
  CUresult (*context_pop)(CUcontext*);
  CUresult (*module_load)(CUmodule*, const void*);
  CUresult (*module_unload)(CUmodule);
  CUresult (*module_function)(CUfunction*, CUmodule, const char*);
  CUresult (*function_get)(int*, int, CUfunction);
  CUresult (*function_set)(CUfunction, int, int);
  /// cuTensorMapEncodeTiled. Dimensions innermost first; strides in bytes, one fewer.
  CUresult (*tensor_map_encode)(TensorMap*, int type, uint32_t rank, void* address, const uint64_t* dims,
                                const uint64_t* strides, const uint32_t* box, const uint32_t* element_strides,
                                int interleave, int swizzle, int l2_promotion, int fill);
  /// What tells whether a stream's work is done; null in the null driver, whose launches never block.
  CUresult (*stream_query)(CUstream);
  CUresult (*stream_is_capturing)(CUstream, int*);
  CUresult (*capture_mode_exchange)(int*);
  /// cuMemAlloc, cuMemFree, cuMemsetD8Async and streams of our own. The null driver's memory is the host's.
  CUresult (*memory_allocate)(uintptr_t*, size_t);
  CUresult (*memory_free)(uintptr_t);
  CUresult (*memory_zero)(uintptr_t, unsigned char, size_t, CUstream);
  CUresult (*stream_create)(CUstream*, unsigned);
  CUresult (*stream_synchronize)(CUstream);
  CUresult (*stream_destroy)(CUstream);
  /// May be null: CUDA 12.4 has them, older drivers do not.
  CUresult (*function_param_info)(CUfunction, size_t, size_t*, size_t*);
  CUresult (*function_load)(CUfunction);
  /// These too: what makes the kernels of a library that somebody else loaded resident.
  CUresult (*library_kernel_count)(unsigned*, CUlibrary);
  CUresult (*library_kernels)(CUkernel*, unsigned, CUlibrary);
  CUresult (*kernel_function)(CUfunction*, CUkernel);
};

/// libcuda's functions. Throws kDriver, with what dlopen said, where there is no driver.
const Driver& cuda_driver();

/// Why there is no CUDA driver here; empty if there is one.
std::string cuda_driver_missing();

const Driver& null_driver();

/// Throws kDriver with the call, the result's number, name and text, and what it was done for.
[[noreturn]] void driver_failed(const Driver& driver, CUresult result, const char* call, const std::string& what);

#define HD_DRIVER(driver, result, call, what)                     \
  do {                                                            \
    const ::hdispatch::CUresult hd_result_ = (result);            \
    if (HD_UNLIKELY(hd_result_ != ::hdispatch::kCudaSuccess))     \
      ::hdispatch::driver_failed(driver, hd_result_, call, what); \
  } while (0)

// ---- the null driver's records ----

/// What a kernel of the null driver is: enough to copy its parameters.
struct NullFunction {
  std::string name;
  std::string file;
  std::vector<uint32_t> param_bytes;
};

/// A launch, or a call of a function with TVM FFI's ABI: then `config` is zero and each param is one argument.
struct NullLaunch {
  std::string function;
  std::string file;
  LaunchConfig config;  ///< `attributes` points nowhere; see the vector
  std::vector<LaunchAttribute> attributes;
  std::vector<std::vector<uint8_t>> params;
};

/// What the null driver encodes: the arguments, readable. Unused entries are 0.
struct NullTensorMap {
  static constexpr uint64_t kMagic = 0x70616d2d6c6c756e;  ///< "null-map"
  uint64_t magic;
  uint64_t address;
  uint64_t dims[kMaxMapRank];
  uint64_t strides[kMaxMapRank - 1];
  uint16_t box[kMaxMapRank];
  uint8_t type;
  uint8_t rank;
  uint8_t swizzle;
  uint8_t fill;
  uint8_t reserved[26];
};
static_assert(sizeof(NullTensorMap) == sizeof(TensorMap));

/// Starts or stops recording; starting forgets what was recorded. Any thread; launches of all threads are recorded.
void null_record(bool on);
bool null_recording() noexcept;
/// Adds to what is recorded, if anything is.
void null_add(NullLaunch launch);
std::vector<NullLaunch> null_launches();

}  // namespace hdispatch
