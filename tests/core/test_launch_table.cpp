// test_launch_table.cpp -- hits, misses, duplicates, and any number of threads.
#include "launch_table.h"

#include <algorithm>
#include <map>
#include <thread>

#include "testing.h"

namespace hdispatch {
namespace {

using namespace testing;

/// Distinct random rows with keys as they occur: few ops and buckets, sizes in steps of 128, some odd.
std::vector<Row> random_rows(uint32_t count, Random& random) {
  std::map<std::pair<uint64_t, uint64_t>, Row> rows;
  while (rows.size() < count) {
    const auto k = static_cast<uint32_t>(random.one_in(8) ? random.in(0, 0xffffffff) : 128 * random.in(1, 200));
    const auto n = static_cast<uint32_t>(random.one_in(2) ? 0 : 128 * random.in(1, 200));
    const Key key = make_key(static_cast<uint16_t>(random.in(0, 15)), static_cast<uint16_t>(random.in(0, 7)), k, n,
                             static_cast<uint16_t>(random.in(0, 13)), 0);
    rows.insert({{key.word0, key.word1}, Row{key, nullptr, static_cast<uint32_t>(rows.size())}});
  }
  std::vector<Row> out;
  for (const auto& [words, row] : rows) out.push_back(row);
  for (uint32_t i = 0; i < count; ++i) out[i].index = i;
  return out;
}

/// Pointers that are only compared.
const Launcher* launcher(uint32_t i) { return reinterpret_cast<const Launcher*>(uintptr_t{i + 1} * 64); }

TEST(empty) {
  const LaunchTable table;
  CHECK(table.find(make_key(0, 0, 0, 0, 0, 0)) == nullptr);
  CHECK(table.find(make_key(1, 2, 3, 4, 5, 0)) == nullptr);
  CHECK(table.rows().empty());
}

TEST(every_row_is_found_and_nothing_else) {
  Random random(7);
  for (const uint32_t count : {1u, 2u, 3u, 4u, 5u, 7u, 8u, 9u, 100u, 1023u, 1024u, 1025u, 10'000u}) {
    std::vector<Row> rows = random_rows(count, random);
    for (uint32_t i = 0; i < count; ++i) rows[i].launcher = launcher(i);
    const LaunchTable table(rows);
    CHECK_EQ(table.rows().size(), rows.size());
    std::map<std::pair<uint64_t, uint64_t>, uint32_t> known;
    for (uint32_t i = 0; i < count; ++i) {
      const Row* row = table.find(rows[i].key);
      CHECK(row && row->index == i && row->launcher == launcher(i) && row->key == rows[i].key);
      CHECK_EQ(table.rows()[i].index, i);
      known[{rows[i].key.word0, rows[i].key.word1}] = i;
    }
    for (int i = 0; i < 20'000; ++i) {
      // One bit away from a row: usually no row, sometimes another one.
      Key key = rows[static_cast<size_t>(random.in(0, count - 1))].key;
      (random.one_in(2) ? key.word0 : key.word1) ^= uint64_t{1} << random.in(0, 63);
      const auto found = known.find({key.word0, key.word1});
      const Row* row = table.find(key);
      CHECK_EQ(row != nullptr, found != known.end());
      if (row && found != known.end()) CHECK_EQ(row->index, found->second);
    }
  }
}

TEST(k_513_misses_the_row_of_k_512) {
  const LaunchTable table({{make_key(0, 0, 512, 0, 0, 0), nullptr, 0}});
  CHECK(table.find(make_key(0, 0, 512, 0, 0, 0)) != nullptr);
  for (const uint32_t k : {0u, 511u, 513u, 1024u, 0x80000200u})
    CHECK(table.find(make_key(0, 0, k, 0, 0, 0)) == nullptr);
  CHECK(table.find(make_key(0, 0, 0, 512, 0, 0)) == nullptr);
}

TEST(zero_is_a_key) {
  const LaunchTable table({{make_key(0, 0, 0, 0, 0, 0), nullptr, 3}});
  const Row* row = table.find(make_key(0, 0, 0, 0, 0, 0));
  CHECK(row && row->index == 3);
}

TEST(rows_that_collide) {
  // Many keys of one slot: the probe goes on past the end of the table and wraps around.
  std::vector<Row> rows;
  std::vector<Key> others;
  for (uint32_t k = 0; rows.size() < 8; ++k) {
    const Key key = make_key(0, 0, k, 0, 0, 0);
    if (hash(key) >> 60 == 14)
      rows.push_back({key, nullptr, static_cast<uint32_t>(rows.size())});
    else
      others.push_back(key);
  }
  const LaunchTable table(rows);
  for (const Row& row : rows) CHECK(table.find(row.key) && table.find(row.key)->index == row.index);
  for (const Key& key : others) CHECK(table.find(key) == nullptr);
}

TEST(duplicates_are_refused) {
  const Key key = make_key(1, 2, 512, 640, 5, 0);
  CHECK_FAULT(kBundle, "rows 0 and 2 have the same key (op 1, variant 2, K 512, N 640, bucket 5)",
              LaunchTable({{key, nullptr, 0}, {make_key(1, 2, 513, 640, 5, 0), nullptr, 1}, {key, nullptr, 2}}));
  Random random(8);
  std::vector<Row> rows = random_rows(10'000, random);
  rows.push_back(rows[1234]);
  rows.back().index = 10'000;
  CHECK_FAULT(kBundle, "rows 1234 and 10000 have the same key", LaunchTable{rows});
}

TEST(the_key_of_an_empty_slot_is_refused) {
  CHECK_FAULT(kInternal, "row 0", LaunchTable({{{~0ull, ~0ull}, nullptr, 0}}));
}

TEST(threads_read_one_table) {
  Random random(9);
  const std::vector<Row> rows = random_rows(10'000, random);
  const LaunchTable table(rows);
  std::vector<std::thread> threads;
  for (uint64_t t = 0; t < 4; ++t)
    threads.emplace_back([&, t] {
      Random mine(100 + t);
      int wrong = 0;
      for (int i = 0; i < 100'000; ++i) {
        const auto at = static_cast<size_t>(mine.in(0, 9'999));
        const Row* row = table.find(rows[at].key);
        wrong += !row || row->index != at;
        wrong += table.find(make_key(100, 0, static_cast<uint32_t>(i), 0, 0, 0)) != nullptr;
      }
      CHECK_EQ(wrong, 0);
    });
  for (std::thread& thread : threads) thread.join();
}

}  // namespace
}  // namespace hdispatch

TEST_MAIN()
