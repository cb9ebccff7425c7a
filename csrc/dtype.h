// dtype.h -- ids of the element types, as used in signatures of calls and in manifests.
//
// Four bits each. The numbers are part of the golden values in the tests; add at the end, never renumber.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string_view>

namespace hdispatch {

enum class DType : uint8_t {
  kNone = 0,  ///< an optional argument that is absent
  kFloat32,
  kFloat64,
  kFloat16,
  kBFloat16,
  kFloat8E4M3FN,
  kFloat8E5M2,
  kInt8,
  kUInt8,
  kInt16,
  kInt32,
  kInt64,
  kBool,
  kOther,  ///< any type that no op takes
};

inline constexpr std::array<std::string_view, 14> kDTypeNames = {
    "None", "float32", "float64", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2",
    "int8", "uint8",   "int16",   "int32",   "int64",    "bool",          "other"};
static_assert(kDTypeNames.size() == static_cast<size_t>(DType::kOther) + 1);
static_assert(static_cast<int>(DType::kOther) < 16, "a signature keeps four bits per argument");

/// Bytes of an element; at least as many for kOther.
inline constexpr std::array<uint8_t, 14> kDTypeBytes = {0, 4, 8, 2, 2, 1, 1, 1, 1, 2, 4, 8, 1, 16};
static_assert(kDTypeBytes.size() == kDTypeNames.size());

/// torch's name without the module.
constexpr std::string_view name(DType dtype) { return kDTypeNames[static_cast<size_t>(dtype)]; }

/// Inverse of `name`; nothing for a name that no op takes.
constexpr std::optional<DType> dtype_named(std::string_view wanted) {
  for (size_t i = 1; i < static_cast<size_t>(DType::kOther); ++i)
    if (kDTypeNames[i] == wanted) return static_cast<DType>(i);
  return std::nullopt;
}

}  // namespace hdispatch
