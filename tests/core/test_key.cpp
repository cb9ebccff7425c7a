// test_key.cpp -- the key's packing and hash: golden values, and no two problems with one key.
#include "key.h"

#include <set>
#include <unordered_set>

#include "testing.h"

namespace hdispatch {
namespace {

using testing::Random;

struct Golden {
  uint16_t op, variant;
  uint32_t k, n;
  uint16_t bucket, device_class;
  uint64_t word0, word1, hash;
};

// Computed outside C++, from the text of key.h. A change here changes what every built table means.
constexpr Golden kGolden[] = {
    {0, 0, 0, 0, 0, 0, 0x0000000000000000, 0x0000000000000000, 0x0000000000000000},
    {0, 0, 512, 0, 3, 0, 0x0000000300000000, 0x0000000000000200, 0xa2016bb794f82a00},
    {0, 0, 513, 0, 3, 0, 0x0000000300000000, 0x0000000000000201, 0x4038e5711442a615},
    {1, 2, 4096, 0, 13, 0, 0x0000000d00020001, 0x0000000000001000, 0x7e8743d809414d93},
    {2, 1, 0, 12288, 7, 0, 0x0000000700010002, 0x0000300000000000, 0x704442cfca46fb26},
    {7, 3, 5120, 25600, 1, 1, 0x0001000100030007, 0x0000640000001400, 0xae6fd99d96e09305},
    {0xfffe, 0xffff, 0xffffffff, 0xffffffff, 0xffff, 0xffff, 0xfffffffffffffffe, 0xffffffffffffffff,
     0xb3f688d5b40188c5},
    {1, 0, 0, 0, 0, 0, 0x0000000000000001, 0x0000000000000000, 0xd6e8feb86659fd93},
    {0, 0, 1, 0, 0, 0, 0x0000000000000000, 0x0000000000000001, 0x9e3779b97f4a7c15},
    {0, 0, 0, 1, 0, 0, 0x0000000000000000, 0x0000000100000000, 0x7f4a7c1500000000},
};

TEST(packing_and_hash_are_the_golden_ones) {
  for (const Golden& g : kGolden) {
    const Key key = make_key(g.op, g.variant, g.k, g.n, g.bucket, g.device_class);
    CHECK_EQ(key.word0, g.word0);
    CHECK_EQ(key.word1, g.word1);
    CHECK_EQ(hash(key), g.hash);
  }
}

TEST(a_bucket_that_comes_last_makes_the_same_key) {
  for (const Golden& g : kGolden) {
    const Key key = with_bucket(make_key(g.op, g.variant, g.k, g.n, 0, g.device_class), g.bucket);
    CHECK_EQ(key.word0, g.word0);
    CHECK_EQ(key.word1, g.word1);
  }
}

TEST(k_513_is_not_k_512) {
  const Key wrong = make_key(0, 0, 512, 0, 3, 0);
  const Key right = make_key(0, 0, 513, 0, 3, 0);
  CHECK(!(wrong == right));
  CHECK(hash(wrong) != hash(right));
  // Nor does any other single bit of K or N get lost.
  for (int bit = 0; bit < 32; ++bit) {
    CHECK(!(make_key(0, 0, 512u ^ 1u << bit, 0, 3, 0) == wrong));
    CHECK(!(make_key(0, 0, 512, 1u << bit, 3, 0) == wrong));
  }
}

TEST(fields_come_back) {
  Random random(1);
  for (int i = 0; i < 100'000; ++i) {
    // Small values, large values and single bits, in every field.
    const auto field = [&random](int bits) {
      const int64_t all = (int64_t{1} << bits) - 1;
      switch (random.in(0, 2)) {
        case 0:
          return random.in(0, 4);
        case 1:
          return int64_t{1} << random.in(0, bits - 1);
        default:
          return random.in(0, all);
      }
    };
    const auto op = static_cast<uint16_t>(field(16)), variant = static_cast<uint16_t>(field(16));
    const auto bucket = static_cast<uint16_t>(field(16)), device = static_cast<uint16_t>(field(16));
    const auto k = static_cast<uint32_t>(field(32)), n = static_cast<uint32_t>(field(32));
    const Key key = make_key(op, variant, k, n, bucket, device);
    CHECK_EQ(key_op(key), op);
    CHECK_EQ(key_variant(key), variant);
    CHECK_EQ(key_bucket(key), bucket);
    CHECK_EQ(static_cast<uint16_t>(key.word0 >> 48), device);
    CHECK_EQ(key_k(key), k);
    CHECK_EQ(key_n(key), n);
  }
}

TEST(no_two_problems_share_a_key) {
  std::set<std::pair<uint64_t, uint64_t>> seen;
  size_t count = 0;
  for (uint16_t op = 0; op < 4; ++op)
    for (uint16_t variant = 0; variant < 4; ++variant)
      for (uint16_t bucket = 0; bucket < 14; ++bucket)
        for (const uint32_t k : {0u, 1u, 2u, 255u, 256u, 511u, 512u, 513u, 65535u, 65536u, ~0u})
          for (const uint32_t n : {0u, 1u, 512u, 513u, 65536u, ~0u}) {
            const Key key = make_key(op, variant, k, n, bucket, 0);
            seen.insert({key.word0, key.word1});
            ++count;
          }
  CHECK_EQ(seen.size(), count);
}

TEST(fits_is_exactly_32_bits) {
  CHECK(fits(0, 0));
  CHECK(fits(0xffffffff, 0xffffffff));
  CHECK(!fits(int64_t{1} << 32, 0));
  CHECK(!fits(0, int64_t{1} << 32));
  CHECK(!fits(512 + (int64_t{1} << 32), 0));  // would be 512 if it were cut
  CHECK(!fits(-1, 0));
  CHECK(!fits(0, INT64_MIN));
  CHECK(!fits(INT64_MAX, INT64_MAX));
}

TEST(hash_spreads_the_upper_bits) {
  // A table takes the upper bits: real keys (multiples of 128, few buckets) must not fall together.
  std::unordered_set<uint64_t> slots;
  int keys = 0;
  for (uint32_t k = 128; k <= 128 * 100; k += 128)
    for (uint16_t bucket = 0; bucket < 14; ++bucket)
      for (uint16_t op = 0; op < 8; ++op, ++keys) slots.insert(hash(make_key(op, 0, k, 0, bucket, 0)) >> 49);
  // 11,200 balls in 32,768 slots: 9,480 distinct for a random function.
  CHECK(slots.size() > 9200);
  CHECK_EQ(keys, 11'200);
}

}  // namespace
}  // namespace hdispatch

TEST_MAIN()
