// test_sequence.cpp -- views, temporaries, chunks, and calls that are checked by slot.
#include "sequence.h"

#include <cstring>
#include <map>
#include <set>

#include "testing.h"
#include "toy_sequences.h"

namespace hdispatch {
namespace {

using namespace testing;

std::string shape(const TensorView& view) {
  std::string out;
  for (uint32_t d = 0; d < view.rank; ++d) out += text(d ? " " : "", view.sizes[d], "/", view.strides[d]);
  return out;
}

// ---- views ----

TEST(views_are_those_of_torch) {
  TensorView view = contiguous(1, DType::kBFloat16, {5, 6144});
  CHECK(narrow(view, 1, 4096, 1024));
  CHECK_EQ(shape(view), "5/6144 1024/1");
  CHECK_EQ(view.data, uintptr_t{4096 + 2 * 4096});
  const int64_t heads[] = {5, 8, 128};
  CHECK(reshape(view, heads, 3));
  CHECK_EQ(shape(view), "5/6144 8/128 128/1");
  CHECK(transpose(view, 0, 1));
  CHECK_EQ(shape(view), "8/128 5/6144 128/1");
  const int64_t flat[] = {40, 128};
  CHECK(!reshape(view, flat, 2));  // would be a copy
  CHECK(!narrow(view, 1, 4, 2) && !narrow(view, 1, -1, 1) && !narrow(view, 3, 0, 1) && !transpose(view, 0, 3));
  CHECK(narrow(view, 1, 5, 0));
}

/// Every element stays where it was: compared by walking both views.
TEST(reshapes_keep_every_element_in_place) {
  Random random(1);
  const auto addresses = [](const TensorView& view) {
    std::vector<int64_t> found = {0};
    for (uint32_t d = 0; d < view.rank; ++d) {
      std::vector<int64_t> next;
      for (const int64_t base : found)
        for (int64_t i = 0; i < view.sizes[d]; ++i) next.push_back(base + i * view.strides[d]);
      found = std::move(next);
    }
    return found;
  };
  int made = 0;
  for (int i = 0; i < 20000; ++i) {
    std::vector<int64_t> sizes;
    for (int64_t d = random.in(1, 4); d > 0; --d) sizes.push_back(random.in(1, 4));
    TensorView view = contiguous(1, DType::kFloat32, sizes);
    for (uint32_t d = 0; d < view.rank; ++d)
      if (random.one_in(3)) narrow(view, d, 0, random.in(1, view.sizes[d]));
    if (view.rank > 1 && random.one_in(3)) transpose(view, 0, view.rank - 1);
    int64_t count = 1;
    for (uint32_t d = 0; d < view.rank; ++d) count *= view.sizes[d];
    std::vector<int64_t> wanted;
    while (wanted.size() < 3 && random.one_in(2)) {
      const int64_t by = random.in(1, 4);
      if (count % by) continue;
      wanted.push_back(by);
      count /= by;
    }
    wanted.push_back(count);
    TensorView changed = view;
    if (!reshape(changed, wanted.data(), static_cast<uint32_t>(wanted.size()))) continue;
    ++made;
    CHECK(addresses(changed) == addresses(view));
  }
  CHECK(made > 5000);
}

TEST(a_contiguous_tensor_takes_every_shape) {
  TensorView view = contiguous(1, DType::kFloat32, {6, 1, 4});
  for (const std::vector<int64_t>& sizes :
       std::vector<std::vector<int64_t>>{{24}, {1, 24}, {2, 3, 4}, {4, 6}, {24, 1}}) {
    TensorView changed = view;
    CHECK(reshape(changed, sizes.data(), static_cast<uint32_t>(sizes.size())));
    CHECK_EQ(shape(changed).substr(0, 3), shape(contiguous(1, DType::kFloat32, sizes)).substr(0, 3));
  }
  const int64_t wrong[] = {5, 5};
  CHECK(!reshape(view, wrong, 2));
  TensorView empty = contiguous(1, DType::kFloat32, {0, 8});
  const int64_t none[] = {0, 2, 4};
  CHECK(reshape(empty, none, 3));
}

// ---- sequences ----

TEST(temporaries_share_bytes_only_where_they_are_not_needed_at_once) {
  Random random(2);
  for (int i = 0; i < 200; ++i) {
    const auto count = static_cast<uint32_t>(random.in(1, 12));
    std::vector<SequenceTemp> temps;
    for (uint32_t t = 0; t < count; ++t) temps.push_back({{rows(random.in(1, 3)), fixed(random.in(1, 300))}, kByte});
    std::vector<SequenceStep> steps;
    std::vector<std::set<uint32_t>> used(count);
    for (uint32_t s = 0, n = static_cast<uint32_t>(random.in(1, 10)); s < n; ++s) {
      std::vector<StepTensor> tensors;
      for (uint32_t t = 0; t < count; ++t)
        if (random.one_in(4)) tensors.push_back(of_temp(static_cast<uint32_t>(tensors.size()), t)), used[t].insert(s);
      steps.push_back(foreign_step(tensors, random.one_in(2)));
    }
    const int64_t max_rows = random.in(1, 40);
    const Sequence sequence("s", {slot("x", {rows()}, kByte)}, temps, steps, max_rows);
    // Which steps are made between which, in order, for both ways.
    for (const int64_t m : {max_rows, 3 * max_rows + 1}) {
      const uintptr_t arena = 1 << 20, whole = uintptr_t{1} << 40;
      const std::vector<uintptr_t> at = sequence.addresses(m, arena, whole);
      const std::vector<SequenceRun> order = sequence.order(m);
      // Walk the order: who wrote each byte last must be who reads it. A use is a write of the use's temporary.
      std::vector<std::pair<size_t, size_t>> life(count, {order.size(), 0});
      for (size_t r = 0; r < order.size(); ++r)
        for (const StepTensor& tensor : steps[order[r].step].tensors) {
          life[tensor.index].first = std::min(life[tensor.index].first, r);
          life[tensor.index].second = r;
        }
      for (uint32_t a = 0; a < count; ++a)
        for (uint32_t b = 0; b < a; ++b) {
          if (used[a].empty() || used[b].empty()) continue;
          const auto is_whole = [&](uint32_t t) { return at[t] >= whole; };
          if (is_whole(a) != is_whole(b)) continue;
          // Of one run alone, a chunk's content ends with the chunk: compared within the first chunk.
          const auto within = [&](uint32_t t) {
            std::pair<size_t, size_t> first = {order.size(), 0};
            for (size_t r = 0; r < order.size(); ++r)
              for (const StepTensor& tensor : steps[order[r].step].tensors)
                if (tensor.index == t && order[r].first == 0) first = {std::min(first.first, r), r};
            return first;
          };
          const auto [a0, a1] = is_whole(a) || m == max_rows ? life[a] : within(a);
          const auto [b0, b1] = is_whole(b) || m == max_rows ? life[b] : within(b);
          if (a1 < b0 || b1 < a0) continue;
          const auto bytes = [&](uint32_t t) {
            const int64_t n = is_whole(t) ? m : max_rows;
            return static_cast<uintptr_t>(temps[t].dims[0].per_row * n * temps[t].dims[1].constant);
          };
          CHECK(at[a] + bytes(a) <= at[b] || at[b] + bytes(b) <= at[a]);
        }
      for (uint32_t t = 0; t < count; ++t) {
        CHECK(at[t] % Sequence::kAlignment == 0);
        const uintptr_t n = static_cast<uintptr_t>(temps[t].dims[0].per_row * (at[t] >= whole ? m : max_rows) *
                                                   temps[t].dims[1].constant);
        if (used[t].empty()) continue;
        CHECK(at[t] >= whole ? at[t] + n <= whole + sequence.whole_bytes(m)
                             : at[t] + n <= arena + sequence.arena_bytes());
      }
    }
  }
}

TEST(steps_by_rows_run_in_chunks_between_those_that_see_all) {
  const auto step = [](bool by_rows) { return foreign_step({}, by_rows); };
  const Sequence sequence("s", {slot("x", {rows()}, kByte)}, {}, {step(true), step(true), step(false), step(true)}, 4);
  const auto print = [&](int64_t m) {
    std::string out;
    for (const SequenceRun& run : sequence.order(m)) out += text(run.step, ":", run.first, "+", run.rows, " ");
    return out;
  };
  CHECK_EQ(print(4), "0:0+4 1:0+4 2:0+4 3:0+4 ");
  CHECK_EQ(print(5), "0:0+3 1:0+3 0:3+2 1:3+2 2:0+5 3:0+3 3:3+2 ");
  CHECK_EQ(print(9), "0:0+3 1:0+3 0:3+3 1:3+3 0:6+3 1:6+3 2:0+9 3:0+3 3:3+3 3:6+3 ");
  for (int64_t m = 1; m < 200; ++m) {
    std::map<uint32_t, int64_t> next;
    for (const SequenceRun& run : sequence.order(m)) {
      CHECK(run.rows >= 1 && run.first == next[run.step]);
      CHECK(run.step == 2 || run.rows <= 4);
      next[run.step] += run.rows;
    }
    for (uint32_t s = 0; s < 4; ++s) CHECK_EQ(next[s], m);
  }
}

TEST(chunks_begin_at_aligned_rows) {
  for (const auto& [m, most] : {std::pair<int64_t, int64_t>{129, 128},
                                {300, 128},
                                {333, 256},
                                {4097, 4096},
                                {1025, 1024},
                                {8191, 1152},
                                {50, 24},
                                {97, 16}}) {
    const Sequence sequence("s", {slot("x", {rows()}, kByte)}, {}, {foreign_step({}, true)}, most);
    int64_t next = 0;
    for (const SequenceRun& run : sequence.order(m)) {
      CHECK(run.first == next && run.rows >= 1 && run.rows <= most);
      CHECK(most % Sequence::kChunkRows || run.first % Sequence::kChunkRows == 0);
      next += run.rows;
    }
    CHECK_EQ(next, m);
  }
}

TEST(a_description_that_cannot_be_run) {
  const SequenceSlot x = slot("x", {rows()}, kByte);
  CHECK_FAULT(kCaller, "sequence s: it has no step", Sequence("s", {x}, {}, {}, 4));
  CHECK_FAULT(kCaller, "no slot has a dimension of M",
              Sequence("s", {slot("x", {fixed(3)}, kByte)}, {}, {foreign_step({})}, 4));
  CHECK_FAULT(kCaller, "max_rows is 0", Sequence("s", {x}, {}, {foreign_step({})}, 0));
  CHECK_FAULT(kCaller, "temporary 0 has rank 0", Sequence("s", {x}, {{{}, kByte}}, {foreign_step({})}, 4));
  CHECK_FAULT(kCaller, "sequence s, step 0 (foreign): it is to work by rows, and takes a tensor [M+1]",
              Sequence("s", {x, slot("y", {rows(1, 1)}, kByte)}, {}, {foreign_step({of_slot(0, 1)}, true)}, 4));
}

TEST(calls_are_checked_by_slot) {
  const Sequence sequence("s", {slot("x", {rows(), fixed(8)}, kByte), slot("ends", {rows(1, 1)}, DType::kInt32)}, {},
                          {foreign_step({})}, 4);
  const auto check = [&](const std::vector<int64_t>& x, const std::vector<int64_t>& ends, DType dtype = kByte) {
    const TensorView views[] = {contiguous(1, dtype, x), contiguous(2, DType::kInt32, ends)};
    return sequence.check(views);
  };
  CHECK_EQ(check({5, 8}, {6}), 5);
  CHECK_EQ(check({0, 8}, {1}), 0);
  CHECK_FAULT(kCaller, "slot x has sizes [5, 9]; it takes [M, 8] with M = 5", check({5, 9}, {6}));
  CHECK_FAULT(kCaller, "slot ends has sizes [5]; it takes [M+1] with M = 5", check({5, 8}, {5}));
  CHECK_FAULT(kCaller, "slot x has rank 1 (sizes [5]); it takes [M, 8]", check({5}, {6}));
  CHECK_FAULT(kCaller, "slot x has dtype bfloat16; it takes float8_e4m3fn", check({5, 8}, {6}, DType::kBFloat16));
  const TensorView none[] = {absent(), contiguous(2, DType::kInt32, {6})};
  CHECK_FAULT(kCaller, "slot x is None; it takes a tensor [M, 8]", sequence.check(none));
}

}  // namespace
}  // namespace hdispatch

TEST_MAIN()
