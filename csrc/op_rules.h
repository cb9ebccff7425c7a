// op_rules.h -- what an op's declaration, its check of a call and its complaint about one share.
//
// The three are op.cpp, op_bind.cpp and op_faults.cpp. Only they include this.
#pragma once

#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "op.h"

namespace hdispatch {

inline constexpr uint8_t kAllStrides = 15;  ///< of TensorRule::free_strides
inline constexpr uint64_t kUnlisted = 15;   ///< nibble of a value that is not compiled in; no variant has it
inline constexpr double kMaxFloat32 = 3.4028234663852886e38;

/// Whether a kernel can take the value as float32. False for NaN too.
inline bool in_range(double value, double minimum) noexcept {
  return value >= minimum && std::abs(value) <= kMaxFloat32;
}

/// `2*K/128`, as the declaration has it.
std::string print_dim(const Dim& dim, const std::vector<ArgSpec>& args);

}  // namespace hdispatch
