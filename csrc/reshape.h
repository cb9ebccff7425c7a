// reshape.h -- a tensor of another rank as one of the rank that an op declares.
//
// PyTorch code calls one op with [batch, M, K] and with [M, K]. An argument says which of these it takes (flat, merge,
// pad); the view is changed before it is checked, so kernels and guards see the declared rank alone.
#pragma once

#include "call.h"

namespace hdispatch {

/// Any rank -> rank 1. False unless it is contiguous, or without elements.
bool flatten(TensorView& view) noexcept;

/// A higher rank -> `rank`: the leading dimensions become one; of rank 2 those of M elements, if M is known (not
/// negative), and those after them another. Null, or what hinders it: "rank", "size" or "strides".
const char* merge(TensorView& view, uint32_t rank, int64_t m) noexcept;

/// A lower rank -> `rank`: dimensions of size 1 after the first. False for a rank below 2 or above `rank`.
bool pad(TensorView& view, uint32_t rank) noexcept;

}  // namespace hdispatch
