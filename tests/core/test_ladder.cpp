// test_ladder.cpp -- M -> bucket at every edge, one below, one above, and beyond the last.
#include "ladder.h"

#include <algorithm>
#include <numeric>

#include "testing.h"

namespace hdispatch {
namespace {

using testing::Random;

constexpr int64_t kHuge = std::numeric_limits<int64_t>::max();

/// The definition, by linear search.
uint32_t expected(const std::vector<int64_t>& edges, int64_t m) {
  for (size_t i = 0; i < edges.size(); ++i)
    if (m <= edges[i]) return static_cast<uint32_t>(i);
  return static_cast<uint32_t>(edges.size() - 1);
}

void check_ladder(const std::vector<int64_t>& edges) {
  const Ladder ladder(edges);
  CHECK_EQ(ladder.size(), edges.size());
  for (uint32_t i = 0; i < edges.size(); ++i) {
    CHECK_EQ(ladder.edge(i), edges[i]);
    CHECK_EQ(ladder.first(i), i ? edges[i - 1] + 1 : 1);
    CHECK_EQ(ladder.bucket(edges[i]), i);
    CHECK_EQ(ladder.bucket(ladder.first(i)), i);
    for (const int64_t m : {edges[i] - 1, edges[i], edges[i] + (edges[i] < kHuge)})
      if (m >= 1) CHECK_EQ(ladder.bucket(m), expected(edges, m));
  }
  for (const int64_t m : {int64_t{1}, int64_t{2}, int64_t{1} << 31, int64_t{1} << 32, kHuge - 1, kHuge})
    CHECK_EQ(ladder.bucket(m), expected(edges, m));
}

TEST(powers_of_two) {
  std::vector<int64_t> edges;
  for (int i = 0; i < 14; ++i) edges.push_back(int64_t{1} << i);
  check_ladder(edges);
  const Ladder ladder(edges);
  CHECK_EQ(ladder.bucket(1), 0u);
  CHECK_EQ(ladder.bucket(2), 1u);
  CHECK_EQ(ladder.bucket(3), 2u);
  CHECK_EQ(ladder.bucket(16), 4u);
  CHECK_EQ(ladder.bucket(17), 5u);
  CHECK_EQ(ladder.bucket(8192), 13u);
  CHECK_EQ(ladder.bucket(8193), 13u);
}

TEST(every_count_of_edges) {
  for (uint32_t count = 1; count <= Ladder::kMaxBuckets; ++count) {
    std::vector<int64_t> edges(count);
    std::iota(edges.begin(), edges.end(), 1);
    check_ladder(edges);
    for (int64_t& edge : edges) edge = edge * 100 + 7;
    check_ladder(edges);
  }
}

TEST(extreme_edges) {
  check_ladder({1});
  check_ladder({kHuge});
  check_ladder({1, kHuge});
  check_ladder({1, 2, kHuge - 1, kHuge});
}

TEST(random_ladders) {
  Random random(2);
  for (int i = 0; i < 2000; ++i) {
    std::vector<int64_t> edges(static_cast<size_t>(random.in(1, 64)));
    const int64_t high = int64_t{1} << random.in(7, 62);
    for (int64_t& edge : edges) edge = random.in(1, high);
    std::sort(edges.begin(), edges.end());
    edges.erase(std::unique(edges.begin(), edges.end()), edges.end());
    check_ladder(edges);
    const Ladder ladder(edges);
    for (int j = 0; j < 20; ++j) {
      const int64_t m = random.in(1, high);
      CHECK_EQ(ladder.bucket(m), expected(edges, m));
    }
  }
}

TEST(bad_edges_are_refused) {
  CHECK_FAULT(kBundle, "a ladder has 0 edges", Ladder(std::vector<int64_t>{}));
  CHECK_FAULT(kBundle, "a ladder has 65 edges", Ladder(std::vector<int64_t>(65, 1)));
  CHECK_FAULT(kBundle, "ladder edge 0 is 0", Ladder({0, 1}));
  CHECK_FAULT(kBundle, "ladder edge 0 is -1", Ladder({-1, 1}));
  CHECK_FAULT(kBundle, "ladder edge 1 is 4", Ladder({4, 4}));
  CHECK_FAULT(kBundle, "ladder edge 2 is 3", Ladder({2, 4, 3}));
}

TEST(no_edges_no_buckets) { CHECK_EQ(Ladder().size(), 0u); }

}  // namespace
}  // namespace hdispatch

TEST_MAIN()
