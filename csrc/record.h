// record.h -- a launch record: how a row's artifact is launched for any call, as data. Plain structs.
//
// Filled from a bundle's manifest (manifest.py says what each field means), then frozen.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "driver.h"
#include "expr.h"

namespace hdispatch {

enum class ParamKind : uint8_t { kPtr, kI1, kI8, kI16, kI32, kI64, kF32, kF64, kTensorMap };

inline constexpr std::array<std::string_view, 9> kParamKindNames = {"ptr", "i1",  "i8",  "i16",       "i32",
                                                                    "i64", "f32", "f64", "tensor_map"};
inline constexpr std::array<uint32_t, 9> kParamBytes = {8, 1, 1, 2, 4, 8, 4, 8, sizeof(TensorMap)};

/// The manifest's names of element types, by TensorMapType.
inline constexpr std::array<std::string_view, 13> kTensorMapTypeNames = {
    "uint8",   "uint16",  "uint32",   "int32",       "uint64",   "int64",       "float16",
    "float32", "float64", "bfloat16", "float32_ftz", "tfloat32", "tfloat32_ftz"};

/// What a TMA descriptor says besides the address. Outermost dimension first; the innermost one's stride is 1.
struct TensorMapSpec {
  TensorMapType type = kMapUInt8;
  std::vector<Expr> shape;    ///< elements
  std::vector<Expr> strides;  ///< elements; one fewer
  std::vector<uint32_t> box;  ///< elements
  uint32_t swizzle = 0;       ///< bytes: 0, 32, 64 or 128
  bool fill_nan = false;      ///< what is outside reads as NaN, else as 0
};

struct Param {
  ParamKind kind = ParamKind::kPtr;
  int arg = -1;         ///< kPtr, kTensorMap: tensor argument; kF32, kF64: scalar argument or -1 for `constant`
  uint32_t align = 1;   ///< kPtr: the address is a multiple of this; a power of two; kTensorMap: always 16
  Expr value;           ///< kPtr, kTensorMap: byte offset; integers: the value
  double constant = 0;  ///< kF32, kF64 with arg < 0
  TensorMapSpec map;    ///< kTensorMap
  std::string name;     ///< of the argument, for messages; empty where it is computed
};

struct Guard {
  Expr expr;
  std::string text;  ///< the fact as text, e.g. "input.stride(0) % 16 == 0"
};

/// The classes of M for which Triton compiles different code.
enum class MClass : uint8_t { kOne, kMult16, kOther };
inline constexpr uint32_t kMClasses = 3;
inline constexpr std::array<std::string_view, kMClasses> kMClassNames = {"one", "mult16", "other"};

constexpr MClass class_of(int64_t m) noexcept {
  return m == 1 ? MClass::kOne : m % 16 == 0 ? MClass::kMult16 : MClass::kOther;
}

/// Code for one class of M. Not present where `file` is empty.
struct Cubin {
  std::string file;
  std::string function;
  std::vector<uint32_t> params;  ///< indices of the record's params that it takes, ascending
  uint32_t num_warps = 0;
  uint32_t shared_bytes = 0;  ///< dynamic
  std::array<uint32_t, 3> cluster = {1, 1, 1};
  bool cooperative = false;
  bool pdl = false;  ///< the code waits for its predecessors itself: launch with the PDL attribute
};

/// A tensor argument that the code writes. It may be absent.
struct Output {
  uint8_t arg = 0;
  bool by_rows = false;  ///< its first dimension's size times stride is at least its extent: for `PendingWrites`
};

/// Far above what any kernel assumes: each guard is tested on every call.
inline constexpr size_t kMaxGuards = 256;

/// What every record has: where it is valid, what it writes, what it reads early.
struct RecordHead {
  std::string kernel;  ///< for messages
  int64_t m_min = 1;
  int64_t m_max = INT64_MAX;
  std::vector<Guard> guards;
  std::vector<uint8_t> early;  ///< tensor arguments that the code may read before it waits for its predecessors
  std::vector<Output> outputs;

  /// The first guard that does not hold for this call, or -1.
  int32_t failed_guard(const Call& call) const noexcept {
    for (size_t i = 0; i < guards.size(); ++i) {
      int64_t holds = 0;
      if (__builtin_expect(!guards[i].expr.evaluate(call, holds) || !holds, 0)) return static_cast<int32_t>(i);
    }
    return -1;
  }
};

/// A kernel in cubins.
struct Record : RecordHead {
  std::array<Expr, 3> grid;
  std::vector<Param> params;
  std::array<Cubin, kMClasses> cubins;
};

enum class FfiArgKind : uint8_t { kTensor, kNone, kInt, kBool, kFloat, kStream, kPdl, kString };
inline constexpr std::array<std::string_view, 8> kFfiArgKindNames = {"tensor", "none",   "int", "bool",
                                                                     "float",  "stream", "pdl", "str"};

/// One argument of a function with TVM FFI's ABI.
struct FfiArg {
  FfiArgKind kind = FfiArgKind::kNone;
  int arg = -1;                ///< kTensor: tensor argument; kFloat: float argument or -1 for `constant`
  uint32_t align = 1;          ///< kTensor: the address is a multiple of this; a power of two
  std::vector<uint8_t> dims;   ///< kTensor: which of the tensor's dimensions it gets, in this order; empty: all
  DType dtype = DType::kNone;  ///< kTensor: as which type of the same size it is passed; kNone: its own
  Expr value;                  ///< kInt, kBool
  double constant = 0;         ///< kFloat with arg < 0
  std::string text;            ///< kString: the constant, without NUL
  std::string name;            ///< of the argument, for messages
};

/// A host function with TVM FFI's ABI, which launches kernels itself.
struct FfiRecord : RecordHead {
  std::string file;      ///< the bundle's library; empty for a function that is registered in process
  std::string function;  ///< its symbol is __tvm_ffi_<function>
  std::vector<FfiArg> args;
  bool pdl = false;         ///< its kernels wait for their predecessors themselves: kPdl arguments may be 1
  bool env_stream = false;  ///< it takes the stream from TVMFFIEnvGetStream
};

}  // namespace hdispatch
