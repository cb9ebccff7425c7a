// overlap.h -- whether tensors share memory: what torch's at::get_overlap_status asks, answered exactly for rows.
//
// torch compares the addresses of dense tensors of one storage and gives up on others. Here a tensor is rows of runs of
// bytes, so that the q and the k of a row of q, k and v are found to be apart. Off the hot path: Op::has_memory comes
// here only where two arguments, one of them written, have the same storage.
#pragma once

#include "call.h"

namespace hdispatch {

/// No element: no memory either. Of a tensor of rank at most kMaxRank.
inline bool is_empty(const TensorView& view) noexcept {
  for (uint32_t d = 0; d < view.rank; ++d)
    if (view.sizes[d] == 0) return true;
  return false;
}

/// Whether each element of one is where that of the other is. A dimension of size 1 has no stride.
bool is_same_view(const TensorView& a, const TensorView& b) noexcept;

/// Whether a byte belongs to both. Strides are not negative. False where that would take some thousand steps to find
/// out: three and more dimensions that interleave without a common stride.
bool overlap(const TensorView& a, const TensorView& b) noexcept;

/// False if the strides nest, each at least the extent of the dimensions with smaller ones: no two elements are the
/// same memory then.
bool may_overlap_itself(const TensorView& view) noexcept;

}  // namespace hdispatch
