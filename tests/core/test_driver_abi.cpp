// test_driver_abi.cpp -- the driver's ABI as driver.h declares it, against cuda.h. Compiled only where there is one.
//
// cuda.h and driver.h declare types of the same names, so the former is read inside a namespace.
#include <stdlib.h>
#include <cstddef>
#include <cstdint>
#include <cstdlib>  // what cuda.h includes, so that it is not read inside the namespace

namespace toolkit {
#include <cuda.h>
}

// cuda.h maps some names to versioned functions with macros.
#undef cuCtxPushCurrent
#undef cuCtxPopCurrent

#include "driver.h"
#include "testing.h"

namespace hdispatch {
namespace {

#define SAME_FIELD(ours, our_field, theirs, their_field)                               \
  static_assert(offsetof(ours, our_field) == offsetof(toolkit::theirs, their_field) && \
                sizeof(ours::our_field) == sizeof(toolkit::theirs::their_field))

static_assert(sizeof(LaunchConfig) == sizeof(toolkit::CUlaunchConfig));
static_assert(alignof(LaunchConfig) == alignof(toolkit::CUlaunchConfig));
static_assert(offsetof(LaunchConfig, grid) == offsetof(toolkit::CUlaunchConfig, gridDimX));
static_assert(offsetof(LaunchConfig, grid) + 4 == offsetof(toolkit::CUlaunchConfig, gridDimY));
static_assert(offsetof(LaunchConfig, grid) + 8 == offsetof(toolkit::CUlaunchConfig, gridDimZ));
static_assert(offsetof(LaunchConfig, block) == offsetof(toolkit::CUlaunchConfig, blockDimX));
static_assert(offsetof(LaunchConfig, block) + 4 == offsetof(toolkit::CUlaunchConfig, blockDimY));
static_assert(offsetof(LaunchConfig, block) + 8 == offsetof(toolkit::CUlaunchConfig, blockDimZ));
SAME_FIELD(LaunchConfig, shared_bytes, CUlaunchConfig, sharedMemBytes);
SAME_FIELD(LaunchConfig, stream, CUlaunchConfig, hStream);
SAME_FIELD(LaunchConfig, attributes, CUlaunchConfig, attrs);
SAME_FIELD(LaunchConfig, attribute_count, CUlaunchConfig, numAttrs);

static_assert(sizeof(LaunchAttribute) == sizeof(toolkit::CUlaunchAttribute));
static_assert(alignof(LaunchAttribute) <= alignof(toolkit::CUlaunchAttribute));
SAME_FIELD(LaunchAttribute, id, CUlaunchAttribute, id);
SAME_FIELD(LaunchAttribute, value, CUlaunchAttribute, value);
using Value = decltype(LaunchAttribute::value);
using TheirValue = toolkit::CUlaunchAttributeValue;
static_assert(sizeof(Value::flag) == sizeof(TheirValue::cooperative) && offsetof(TheirValue, cooperative) == 0);
static_assert(sizeof(Value::flag) == sizeof(TheirValue::programmaticStreamSerializationAllowed) &&
              offsetof(TheirValue, programmaticStreamSerializationAllowed) == 0);
static_assert(sizeof(Value::flag) == sizeof(TheirValue::clusterSchedulingPolicyPreference) &&
              offsetof(TheirValue, clusterSchedulingPolicyPreference) == 0);
static_assert(offsetof(TheirValue, clusterDim.x) == offsetof(Value, cluster.x));
static_assert(offsetof(TheirValue, clusterDim.y) == offsetof(Value, cluster.y));
static_assert(offsetof(TheirValue, clusterDim.z) == offsetof(Value, cluster.z));
static_assert(toolkit::CU_CLUSTER_SCHEDULING_POLICY_SPREAD == 1);

static_assert(uint32_t{kAttributeCooperative} == toolkit::CU_LAUNCH_ATTRIBUTE_COOPERATIVE);
static_assert(uint32_t{kAttributeClusterDimension} == toolkit::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION);
static_assert(uint32_t{kAttributeClusterSchedulingPolicy} ==
              toolkit::CU_LAUNCH_ATTRIBUTE_CLUSTER_SCHEDULING_POLICY_PREFERENCE);
static_assert(uint32_t{kAttributeProgrammaticStreamSerialization} ==
              toolkit::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION);

static_assert(int{kFunctionSharedBytes} == toolkit::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES);
static_assert(int{kFunctionMaxDynamicSharedBytes} == toolkit::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES);
static_assert(int{kFunctionNonPortableCluster} == toolkit::CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED);

static_assert(sizeof(TensorMap) == sizeof(toolkit::CUtensorMap));
static_assert(int{kMapUInt8} == toolkit::CU_TENSOR_MAP_DATA_TYPE_UINT8);
static_assert(int{kMapUInt16} == toolkit::CU_TENSOR_MAP_DATA_TYPE_UINT16);
static_assert(int{kMapUInt32} == toolkit::CU_TENSOR_MAP_DATA_TYPE_UINT32);
static_assert(int{kMapInt32} == toolkit::CU_TENSOR_MAP_DATA_TYPE_INT32);
static_assert(int{kMapUInt64} == toolkit::CU_TENSOR_MAP_DATA_TYPE_UINT64);
static_assert(int{kMapInt64} == toolkit::CU_TENSOR_MAP_DATA_TYPE_INT64);
static_assert(int{kMapFloat16} == toolkit::CU_TENSOR_MAP_DATA_TYPE_FLOAT16);
static_assert(int{kMapFloat32} == toolkit::CU_TENSOR_MAP_DATA_TYPE_FLOAT32);
static_assert(int{kMapFloat64} == toolkit::CU_TENSOR_MAP_DATA_TYPE_FLOAT64);
static_assert(int{kMapBFloat16} == toolkit::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16);
static_assert(int{kMapFloat32Ftz} == toolkit::CU_TENSOR_MAP_DATA_TYPE_FLOAT32_FTZ);
static_assert(int{kMapTFloat32} == toolkit::CU_TENSOR_MAP_DATA_TYPE_TFLOAT32);
static_assert(int{kMapTFloat32Ftz} == toolkit::CU_TENSOR_MAP_DATA_TYPE_TFLOAT32_FTZ);
static_assert(int{kMapInterleaveNone} == toolkit::CU_TENSOR_MAP_INTERLEAVE_NONE);
static_assert(int{kMapL2Promotion128} == toolkit::CU_TENSOR_MAP_L2_PROMOTION_L2_128B);
static_assert(int{kMapFillZero} == toolkit::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
static_assert(int{kMapFillNan} == toolkit::CU_TENSOR_MAP_FLOAT_OOB_FILL_NAN_REQUEST_ZERO_FMA);
static_assert(toolkit::CU_TENSOR_MAP_SWIZZLE_NONE == 0 && toolkit::CU_TENSOR_MAP_SWIZZLE_32B == 1 &&
              toolkit::CU_TENSOR_MAP_SWIZZLE_64B == 2 && toolkit::CU_TENSOR_MAP_SWIZZLE_128B == 3);

static_assert(kNotCapturing == toolkit::CU_STREAM_CAPTURE_STATUS_NONE);
static_assert(kCaptureModeRelaxed == toolkit::CU_STREAM_CAPTURE_MODE_RELAXED);
static_assert(sizeof(toolkit::CUstreamCaptureStatus) == sizeof(int) &&
              sizeof(toolkit::CUstreamCaptureMode) == sizeof(int));
static_assert(kCudaSuccess == toolkit::CUDA_SUCCESS);
static_assert(kCudaInvalidValue == toolkit::CUDA_ERROR_INVALID_VALUE);
static_assert(sizeof(CUresult) == sizeof(toolkit::CUresult));
static_assert(sizeof(CUdevice) == sizeof(toolkit::CUdevice));

/// Parameter by parameter of the same size: pointers are pointers, enums are ints.
template <typename Ours, typename Theirs>
struct SameAbi : std::false_type {};
template <typename R1, typename... A1, typename R2, typename... A2>
  requires(sizeof...(A1) == sizeof...(A2))
struct SameAbi<R1 (*)(A1...), R2(A2...)>
    : std::bool_constant<sizeof(R1) == sizeof(R2) &&
                         ((sizeof(A1) == sizeof(A2) && std::is_pointer_v<A1> == std::is_pointer_v<A2>) && ...)> {};

#define SAME_FUNCTION(ours, theirs) static_assert(SameAbi<decltype(Driver::ours), decltype(toolkit::theirs)>::value)

SAME_FUNCTION(launch, cuLaunchKernelEx);
SAME_FUNCTION(init, cuInit);
SAME_FUNCTION(driver_version, cuDriverGetVersion);
SAME_FUNCTION(error_name, cuGetErrorName);
SAME_FUNCTION(error_string, cuGetErrorString);
SAME_FUNCTION(device_get, cuDeviceGet);
SAME_FUNCTION(primary_context_retain, cuDevicePrimaryCtxRetain);
SAME_FUNCTION(context_get, cuCtxGetCurrent);
SAME_FUNCTION(context_set, cuCtxSetCurrent);
SAME_FUNCTION(context_push, cuCtxPushCurrent_v2);
SAME_FUNCTION(context_pop, cuCtxPopCurrent_v2);
SAME_FUNCTION(module_load, cuModuleLoadData);
SAME_FUNCTION(module_unload, cuModuleUnload);
SAME_FUNCTION(module_function, cuModuleGetFunction);
SAME_FUNCTION(function_get, cuFuncGetAttribute);
SAME_FUNCTION(function_set, cuFuncSetAttribute);
SAME_FUNCTION(tensor_map_encode, cuTensorMapEncodeTiled);
SAME_FUNCTION(stream_query, cuStreamQuery);
SAME_FUNCTION(memory_allocate, cuMemAlloc);
SAME_FUNCTION(memory_free, cuMemFree);
SAME_FUNCTION(memory_zero, cuMemsetD8Async);
SAME_FUNCTION(stream_create, cuStreamCreate);
SAME_FUNCTION(stream_synchronize, cuStreamSynchronize);
SAME_FUNCTION(stream_destroy, cuStreamDestroy);
SAME_FUNCTION(stream_is_capturing, cuStreamIsCapturing);
SAME_FUNCTION(capture_mode_exchange, cuThreadExchangeStreamCaptureMode);
#if CUDA_VERSION >= 12040
SAME_FUNCTION(function_param_info, cuFuncGetParamInfo);
SAME_FUNCTION(function_load, cuFuncLoad);
SAME_FUNCTION(library_kernel_count, cuLibraryGetKernelCount);
SAME_FUNCTION(library_kernels, cuLibraryEnumerateKernels);
SAME_FUNCTION(kernel_function, cuKernelGetFunction);
#endif

TEST(the_abi_is_the_toolkits) { CHECK(CUDA_VERSION >= 12000); }

}  // namespace
}  // namespace hdispatch

TEST_MAIN()
