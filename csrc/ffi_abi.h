// ffi_abi.h -- TVM FFI's C ABI, as much of it as a caller needs: values, tensors, functions, errors.
//
// As of tvm/ffi/c_api.h 0.1.16 and dlpack.h 1.3. TVM FFI promises this ABI for every 0.1.x ("0.X.Y, X = C ABI break");
// tests/core/test_ffi_abi.cpp compares it with the real headers, where they are installed. Nothing of TVM FFI is
// linked.
#pragma once

#include <cstddef>
#include <cstdint>

namespace hdispatch::ffi {

// ---- DLPack ----

enum DeviceType : int32_t { kDeviceCpu = 1, kDeviceCuda = 2 };

struct Device {
  int32_t type;
  int32_t id;
};

enum DataTypeCode : uint8_t {
  kCodeInt = 0,
  kCodeUInt = 1,
  kCodeFloat = 2,
  kCodeBFloat = 4,
  kCodeBool = 6,
  kCodeFloat8E4M3FN = 10,
  kCodeFloat8E5M2 = 12,
};

struct DataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

/// DLTensor. A borrowed view; a callee that keeps it must copy.
struct Tensor {
  void* data;
  Device device;
  int32_t rank;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;  ///< elements
  uint64_t byte_offset;
};
static_assert(sizeof(Tensor) == 48 && offsetof(Tensor, shape) == 24);

// ---- values ----

enum TypeIndex : int32_t {
  kTypeNone = 0,
  kTypeInt = 1,
  kTypeBool = 2,
  kTypeFloat = 3,
  kTypeOpaquePtr = 4,
  kTypeTensorPtr = 7,  ///< DLTensor*
  kTypeRawStr = 8,     ///< const char*, up to NUL
  kTypeObjectBegin = 64,
  kTypeError = 67,
  kTypeFunction = 68,
};

/// TVMFFIAny: a value and what it is; all zero is None.
struct Any {
  int32_t type;
  uint32_t zero;
  union {
    int64_t integer;
    double real;
    void* pointer;
  };
};
static_assert(sizeof(Any) == 16 && offsetof(Any, integer) == 8);

// ---- objects ----

/// TVMFFIObject: what every object begins with.
struct Object {
  uint64_t reference_counts;
  int32_t type;
  uint32_t padding;
  void (*deleter)(void* self, int flags);
};
static_assert(sizeof(Object) == 24);

/// TVMFFISafeCallType. 0: done, `result` is set; else an error, which the thread's raised-error slot holds.
using SafeCall = int (*)(void* self, const Any* args, int32_t count, Any* result);

/// TVMFFIFunctionObj: a function behind a handle; the handle is `self` of its call.
struct Function {
  Object object;
  SafeCall safe_call;
  void* cpp_call;
};
static_assert(sizeof(Function) == 40 && offsetof(Function, safe_call) == 24);

struct Bytes {
  const char* data;
  size_t size;
};

/// TVMFFIErrorObj, as far as it is read.
struct ErrorObject {
  Object object;
  Bytes kind;
  Bytes message;
  Bytes backtrace;
};
static_assert(offsetof(ErrorObject, kind) == 24 && offsetof(ErrorObject, message) == 40);

// ---- functions of libtvm_ffi ----

struct Version {
  uint32_t major;
  uint32_t minor;  ///< another one is another ABI
  uint32_t patch;
};

using GetVersion = void (*)(Version* out);
using ErrorMoveFromRaised = void (*)(void** error);
using ObjectDecRef = int (*)(void* object);
using EnvSetStream = int (*)(int32_t device_type, int32_t device_id, void* stream, void** before);

}  // namespace hdispatch::ffi
