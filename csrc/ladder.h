// ladder.h -- M, or a run-time integer beside it, -> bucket.
//
// A ladder is the ascending list of the buckets' upper edges. Bucket i holds edges[i-1] < M <= edges[i]; the last one
// also holds everything above, so that every M >= 1 has a bucket. The bucket selects a row; it never changes a result.
#pragma once

#include <array>
#include <cstdint>
#include <limits>
#include <vector>

#include "check.h"

namespace hdispatch {

class Ladder {
 public:
  static constexpr uint32_t kMaxBuckets = 64;

  Ladder() { edges_.fill(std::numeric_limits<int64_t>::max()); }

  explicit Ladder(const std::vector<int64_t>& edges) : Ladder() {
    HD_CHECK_BUNDLE(!edges.empty() && edges.size() <= kMaxBuckets, "a ladder has ", edges.size(),
                    " edges; it takes 1 to ", kMaxBuckets);
    for (size_t i = 0; i < edges.size(); ++i) {
      HD_CHECK_BUNDLE(edges[i] > (i ? edges[i - 1] : 0), "ladder edge ", i, " is ", edges[i],
                      "; edges ascend from at least 1");
      edges_[i] = edges[i];
    }
    count_ = static_cast<uint32_t>(edges.size());
  }

  /// Bucket of M >= 1. Branch-free binary search over the padded edges: six steps, whatever M.
  uint32_t bucket(int64_t m) const noexcept {
    uint32_t low = 0;
    for (uint32_t step = kMaxBuckets / 2; step; step /= 2) low += edges_[low + step - 1] < m ? step : 0;
    return low < count_ ? low : count_ - 1;
  }

  uint32_t size() const noexcept { return count_; }
  int64_t edge(uint32_t bucket) const noexcept { return edges_[bucket]; }
  /// Smallest M of a bucket.
  int64_t first(uint32_t bucket) const noexcept { return bucket ? edges_[bucket - 1] + 1 : 1; }

 private:
  std::array<int64_t, kMaxBuckets> edges_;
  uint32_t count_ = 0;
};

}  // namespace hdispatch
