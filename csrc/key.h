// key.h -- the key of the launch table: (op, variant, K, N, M bucket) in two machine words.
//
//   word 0   op:16 | variant:16 | bucket:16 | device class:16   the last is 0: one table serves one device
//   word 1   K:32 | N:32
//
// Nothing is rounded or dropped: K = 513 and K = 512 differ. Only M is bucketed, and an integer argument with a ladder
// of its own: the bucket is then (bucket of M) * (buckets of the integer) + (bucket of the integer). Sizes that do not
// fit are refused at the door (`fits`). Golden values of packing and hash are pinned in tests/core/test_key.cpp.
#pragma once

#include <cstdint>

namespace hdispatch {

struct Key {
  uint64_t word0 = 0;
  uint64_t word1 = 0;
  friend bool operator==(const Key&, const Key&) = default;
};
static_assert(sizeof(Key) == 16);

constexpr bool fits(int64_t k, int64_t n) noexcept {
  return ((static_cast<uint64_t>(k) | static_cast<uint64_t>(n)) >> 32) == 0;
}

constexpr Key make_key(uint16_t op, uint16_t variant, uint32_t k, uint32_t n, uint16_t bucket,
                       uint16_t device_class = 0) noexcept {
  return {uint64_t{op} | uint64_t{variant} << 16 | uint64_t{bucket} << 32 | uint64_t{device_class} << 48,
          uint64_t{k} | uint64_t{n} << 32};
}

/// The key with its bucket, for one that was made with bucket 0: a call's bucket is known last, when the table is.
constexpr Key with_bucket(const Key& key, uint32_t bucket) noexcept {
  return {key.word0 | uint64_t{bucket} << 32, key.word1};
}

constexpr uint16_t key_op(const Key& key) noexcept { return static_cast<uint16_t>(key.word0); }
constexpr uint16_t key_variant(const Key& key) noexcept { return static_cast<uint16_t>(key.word0 >> 16); }
constexpr uint16_t key_bucket(const Key& key) noexcept { return static_cast<uint16_t>(key.word0 >> 32); }
constexpr uint32_t key_k(const Key& key) noexcept { return static_cast<uint32_t>(key.word1); }
constexpr uint32_t key_n(const Key& key) noexcept { return static_cast<uint32_t>(key.word1 >> 32); }

/// Multiplicative hashing of both words; the upper bits are the good ones. The golden ratio and an odd random number.
/// On the key sets of real bundles 1.15 to 1.23 probes per hit at worst 8, as with wyhash's folded product, which takes
/// three cycles more of a probe's 25.
constexpr uint64_t hash(const Key& key) noexcept {
  return key.word0 * 0xd6e8feb86659fd93u + key.word1 * 0x9e3779b97f4a7c15u;
}

}  // namespace hdispatch
