// reshape.cpp -- flattening, merging and padding the dimensions of a view.
#include "reshape.h"

#include <algorithm>

namespace hdispatch {
namespace {

bool is_contiguous(const TensorView& view) noexcept {
  int64_t contiguous = 1;
  for (uint32_t d = view.rank; d-- > 0;) {
    if (view.sizes[d] > 1 && view.strides[d] != contiguous) return false;
    contiguous = times(contiguous, std::max<int64_t>(view.sizes[d], 1));
  }
  return true;
}

/// Dimensions from `first` up to `past`, of `count` elements, become one, if their strides allow it.
bool merge_range(TensorView& view, uint32_t first, uint32_t past) noexcept {
  int64_t count = 1, stride = 1;
  for (uint32_t d = past; d-- > first;) {
    if (view.sizes[d] == 1) continue;
    if (count == 1)
      stride = view.strides[d];
    else if (view.strides[d] != times(stride, count) && count != 0 && view.sizes[d] != 0)
      return false;
    count = times(count, view.sizes[d]);
  }
  view.sizes[first] = count;
  view.strides[first] = stride;
  for (uint32_t d = past; d < view.rank; ++d) {
    view.sizes[d - past + first + 1] = view.sizes[d];
    view.strides[d - past + first + 1] = view.strides[d];
  }
  view.rank -= past - first - 1;
  return true;
}

}  // namespace

bool flatten(TensorView& view) noexcept {
  if (view.rank > kMaxRank) return false;
  int64_t count = 1;
  for (uint32_t d = 0; d < view.rank; ++d) count = times(count, view.sizes[d]);
  if (count > 1 && !is_contiguous(view)) return false;
  view.rank = 1;
  view.sizes[0] = count;
  view.strides[0] = 1;
  return true;
}

const char* merge(TensorView& view, uint32_t rank, int64_t m) noexcept {
  if (view.rank > kMaxRank) return "rank";
  uint32_t leading = view.rank - rank + 1;
  if (rank == 2 && m >= 0) {
    int64_t count = view.sizes[0];
    for (leading = 1; count != m && leading < view.rank - 1; ++leading) count = times(count, view.sizes[leading]);
    if (count != m) return "size";
  }
  if (!merge_range(view, 0, leading)) return "strides";
  return view.rank == rank || merge_range(view, rank - 1, view.rank) ? nullptr : "strides";
}

bool pad(TensorView& view, uint32_t rank) noexcept {
  if (view.rank > rank || view.rank < 2) return view.rank == rank;
  const uint32_t added = rank - view.rank;
  for (uint32_t d = rank; d-- > 1 + added;) {
    view.sizes[d] = view.sizes[d - added];
    view.strides[d] = view.strides[d - added];
  }
  for (uint32_t d = 1; d <= added; ++d) {
    view.sizes[d] = 1;
    view.strides[d] = 1;
  }
  view.rank = rank;
  return true;
}

}  // namespace hdispatch
