// test_overlap.cpp -- whether views share memory, against every byte of them.
#include "overlap.h"

#include <random>
#include <set>

#include "calls.h"
#include "testing.h"

namespace hdispatch {
namespace {

using namespace testing;

TensorView view(uintptr_t data, const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                DType dtype = DType::kFloat32) {
  TensorView out = contiguous(0, dtype, sizes);
  out.data = data;
  for (size_t d = 0; d < strides.size(); ++d) out.strides[d] = strides[d];
  return out;
}

/// Addresses of all bytes; how often the same one comes twice is added to `repeats`.
std::set<uintptr_t> bytes_of(const TensorView& view, int& repeats) {
  std::set<uintptr_t> out;
  int64_t at[kMaxRank] = {};
  if (is_empty(view)) return out;
  while (true) {
    int64_t element = 0;
    for (uint32_t d = 0; d < view.rank; ++d) element += at[d] * view.strides[d];
    const uintptr_t bytes = kDTypeBytes[static_cast<size_t>(view.dtype)];
    for (uintptr_t i = 0; i < bytes; ++i)
      repeats += !out.insert(view.data + static_cast<uintptr_t>(element) * bytes + i).second;
    uint32_t d = view.rank;
    while (d-- > 0 && ++at[d] == view.sizes[d]) at[d] = 0;
    if (d == ~0u) return out;
  }
}

TEST(rows_beside_each_other) {
  // q and k of a row of q, k and v.
  const TensorView q = view(4096, {7, 64}, {192, 1}), k = view(4096 + 64 * 4, {7, 64}, {192, 1});
  CHECK(!overlap(q, k));
  CHECK(!overlap(k, q));
  CHECK(overlap(q, view(4096 + 63 * 4, {7, 64}, {192, 1})));
  CHECK(overlap(view(4096 + 191 * 4, {7, 2}, {192, 1}), q));
  CHECK(!overlap(view(4096 + 191 * 4, {7, 1}, {192, 1}), q));
  CHECK(!overlap(q, view(4096, {0, 64}, {192, 1})));
  // Heads of q in three dimensions, and what is left of each.
  CHECK(!overlap(view(4096, {7, 3, 32}, {192, 64, 1}), view(4096 + 32 * 4, {7, 3, 32}, {192, 64, 1})));
  CHECK(overlap(view(4096, {7, 3, 33}, {192, 64, 1}), view(4096 + 32 * 4, {7, 3, 32}, {192, 64, 1})));
}

TEST(the_same_view) {
  const TensorView a = view(4096, {7, 64}, {64, 1});
  CHECK(is_same_view(a, a));
  CHECK(is_same_view(view(4096, {1, 64}, {64, 1}), view(4096, {1, 64}, {9, 1})));
  CHECK(!is_same_view(a, view(4096, {7, 64}, {65, 1})));
  CHECK(!is_same_view(a, view(4100, {7, 64}, {64, 1})));
  CHECK(!is_same_view(a, view(4096, {7, 64}, {64, 1}, DType::kInt32)));
}

TEST(random_views_against_all_bytes) {
  std::mt19937 random(1);
  const auto any = [&random](int64_t from, int64_t to) {
    return std::uniform_int_distribution<int64_t>(from, to)(random);
  };
  const auto make = [&] {
    std::vector<int64_t> sizes, strides;
    for (int64_t rank = any(0, 4); rank > 0; --rank) {
      sizes.push_back(any(0, 30) == 0 ? 0 : any(1, 5));
      strides.push_back(any(0, 10) == 0 ? 0 : any(1, 40));
    }
    constexpr DType kTypes[] = {DType::kInt8, DType::kFloat16, DType::kFloat32};
    return view(static_cast<uintptr_t>(4096 + any(0, 100) * 4), sizes, strides, kTypes[any(0, 2)]);
  };
  int apart = 0, nested = 0;
  for (int i = 0; i < 20000; ++i) {
    const TensorView a = make(), b = make();
    int repeats = 0, ignored = 0;
    const std::set<uintptr_t> bytes = bytes_of(a, repeats), others = bytes_of(b, ignored);
    bool shared = false;
    for (const uintptr_t byte : bytes) shared |= others.contains(byte);
    CHECK_EQ(overlap(a, b), shared);
    CHECK_EQ(overlap(b, a), shared);
    if (!may_overlap_itself(a)) {
      CHECK_EQ(repeats, 0);
      ++nested;
    }
    apart += !shared;
  }
  CHECK(apart > 1000);
  CHECK(nested > 1000);
}

}  // namespace
}  // namespace hdispatch

TEST_MAIN()
