// test_ffi_abi.cpp -- TVM FFI's ABI as ffi_abi.h declares it, against its own headers. Compiled only where they are.
#include <tvm/ffi/c_api.h>
#include <tvm/ffi/extra/c_env_api.h>

#include <type_traits>

#include "ffi_abi.h"
#include "testing.h"

namespace hdispatch::ffi {
namespace {

#define SAME_FIELD(ours, our_field, theirs, their_field)                      \
  static_assert(offsetof(ours, our_field) == offsetof(theirs, their_field) && \
                sizeof(ours::our_field) == sizeof(theirs::their_field))
#define SAME_SIZE(ours, theirs) static_assert(sizeof(ours) == sizeof(theirs) && alignof(ours) == alignof(theirs))

SAME_SIZE(Device, DLDevice);
SAME_FIELD(Device, type, DLDevice, device_type);
SAME_FIELD(Device, id, DLDevice, device_id);
SAME_SIZE(DataType, DLDataType);
SAME_FIELD(DataType, code, DLDataType, code);
SAME_FIELD(DataType, bits, DLDataType, bits);
SAME_FIELD(DataType, lanes, DLDataType, lanes);
SAME_SIZE(Tensor, DLTensor);
SAME_FIELD(Tensor, data, DLTensor, data);
SAME_FIELD(Tensor, device, DLTensor, device);
SAME_FIELD(Tensor, rank, DLTensor, ndim);
SAME_FIELD(Tensor, dtype, DLTensor, dtype);
SAME_FIELD(Tensor, shape, DLTensor, shape);
SAME_FIELD(Tensor, strides, DLTensor, strides);
SAME_FIELD(Tensor, byte_offset, DLTensor, byte_offset);
SAME_SIZE(Any, TVMFFIAny);
SAME_FIELD(Any, type, TVMFFIAny, type_index);
SAME_FIELD(Any, zero, TVMFFIAny, zero_padding);
SAME_FIELD(Any, integer, TVMFFIAny, v_int64);
SAME_FIELD(Any, real, TVMFFIAny, v_float64);
SAME_FIELD(Any, pointer, TVMFFIAny, v_ptr);
SAME_SIZE(Object, TVMFFIObject);
SAME_FIELD(Object, reference_counts, TVMFFIObject, combined_ref_count);
SAME_FIELD(Object, type, TVMFFIObject, type_index);
SAME_FIELD(Object, deleter, TVMFFIObject, deleter);
SAME_SIZE(Bytes, TVMFFIByteArray);
// An object's cell follows its header: TVMFFIFunctionGetCellPtr, TVMFFIErrorGetCellPtr.
static_assert(offsetof(Function, safe_call) == sizeof(TVMFFIObject) + offsetof(TVMFFIFunctionCell, safe_call));
static_assert(sizeof(Function) == sizeof(TVMFFIObject) + sizeof(TVMFFIFunctionCell));
static_assert(offsetof(ErrorObject, kind) == sizeof(TVMFFIObject) + offsetof(TVMFFIErrorCell, kind));
static_assert(offsetof(ErrorObject, message) == sizeof(TVMFFIObject) + offsetof(TVMFFIErrorCell, message));

static_assert(int{kDeviceCpu} == kDLCPU && int{kDeviceCuda} == kDLCUDA);
static_assert(int{kCodeInt} == kDLInt && int{kCodeUInt} == kDLUInt && int{kCodeFloat} == kDLFloat);
static_assert(int{kCodeBFloat} == kDLBfloat && int{kCodeBool} == kDLBool);
static_assert(int{kCodeFloat8E4M3FN} == kDLFloat8_e4m3fn && int{kCodeFloat8E5M2} == kDLFloat8_e5m2);
static_assert(int{kTypeNone} == kTVMFFINone && int{kTypeInt} == kTVMFFIInt && int{kTypeBool} == kTVMFFIBool);
static_assert(int{kTypeFloat} == kTVMFFIFloat && int{kTypeOpaquePtr} == kTVMFFIOpaquePtr);
static_assert(int{kTypeTensorPtr} == kTVMFFIDLTensorPtr && int{kTypeRawStr} == kTVMFFIRawStr);
static_assert(int{kTypeObjectBegin} == kTVMFFIStaticObjectBegin);
static_assert(int{kTypeError} == kTVMFFIError && int{kTypeFunction} == kTVMFFIFunction);

/// Parameter by parameter of the same size: pointers are pointers, enums are ints.
template <typename Ours, typename Theirs>
struct SameAbi : std::false_type {};
template <typename R1, typename... A1, typename R2, typename... A2>
  requires(sizeof...(A1) == sizeof...(A2))
struct SameAbi<R1 (*)(A1...), R2 (*)(A2...)>
    : std::bool_constant<std::is_same_v<R1, R2> && ((std::is_pointer_v<A1> == std::is_pointer_v<A2> &&
                                                     (std::is_pointer_v<A1> || std::is_same_v<A1, A2>)) &&
                                                    ...)> {};
SAME_SIZE(Version, TVMFFIVersion);
SAME_FIELD(Version, minor, TVMFFIVersion, minor);
static_assert(SameAbi<GetVersion, decltype(&TVMFFIGetVersion)>::value);
static_assert(SameAbi<SafeCall, TVMFFISafeCallType>::value);
static_assert(SameAbi<ErrorMoveFromRaised, decltype(&TVMFFIErrorMoveFromRaised)>::value);
static_assert(SameAbi<ObjectDecRef, decltype(&TVMFFIObjectDecRef)>::value);
static_assert(SameAbi<EnvSetStream, decltype(&TVMFFIEnvSetStream)>::value);

TEST(the_abi_is_of_the_version_that_was_read) { CHECK(TVM_FFI_VERSION_MAJOR == 0 && TVM_FFI_VERSION_MINOR == 1); }

}  // namespace
}  // namespace hdispatch::ffi

TEST_MAIN()
