// tensor_map.cpp -- encoding TMA descriptors and keeping them.
#include "tensor_map.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>

#include "check.h"

namespace hdispatch {
namespace {

constexpr uint32_t kTypeBytes[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};
constexpr uint32_t kMaxBox = 256;
constexpr int64_t kMaxSize = int64_t{1} << 32;
constexpr int64_t kMaxStrideBytes = int64_t{1} << 40;
constexpr uint64_t kAlignment = 16;

/// Drivers up to this version set bit 85 of small maps, where it makes a Blackwell GPU read outside the tensor; Hopper
/// ignores it.
constexpr int kLastWithBit85 = 13010;
constexpr int64_t kSmallBytes = 128 * 1024;

constexpr uint32_t kMaxKeyWords = 2 + kMaxMapRank + kMaxMapRank - 1;

// ---- the thread's cache ----

constexpr uint32_t kSetBits = 8;
constexpr uint32_t kWayBits = 2;

struct alignas(64) Slot {
  uint64_t key[16];  ///< empty where key[0] is 0
  TensorMap map;
};
static_assert(kMaxKeyWords <= std::size(Slot{}.key));

constexpr size_t kCacheBytes = sizeof(Slot) << (kSetBits + kWayBits);

/// 256 KiB of zeros that take no memory until they are written; null before the thread's first map.
thread_local Slot* slots = nullptr;

struct Owner {
  ~Owner() {
    if (slots) munmap(slots, kCacheBytes);
    slots = nullptr;
  }
};

bool open_cache() noexcept {
  static thread_local Owner owner;  // touched here alone: `slots` is read on every call and needs no guard
  (void)owner;
  void* pages = mmap(nullptr, kCacheBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (pages == MAP_FAILED) return false;
  slots = static_cast<Slot*>(pages);
  return true;
}

Slot* set_of(const uint64_t* key, uint32_t words) noexcept {
  uint64_t hash = 0;
  for (uint32_t i = 0; i < words; ++i) hash = (hash ^ key[i]) * 0x9e3779b97f4a7c15;
  return slots + (hash >> (64 - kSetBits) << kWayBits);
}

const Slot* find(const uint64_t* key, uint32_t words) noexcept {
  const Slot* set = set_of(key, words);
  for (const Slot* slot = set; slot < set + (1 << kWayBits); ++slot) {
    uint32_t same = 0;
    while (same < words && slot->key[same] == key[same]) ++same;
    if (same == words) return slot;
  }
  return nullptr;
}

void insert(const uint64_t* key, uint32_t words, const TensorMap& map) noexcept {
  // At random: in turn, five maps of one set that are used in turn would drive each other out for ever.
  static thread_local uint64_t random = 1;
  random = random * 6364136223846793005u + 1442695040888963407u;
  Slot* set = set_of(key, words);
  Slot* empty = std::find_if(set, set + (1 << kWayBits), [](const Slot& slot) { return !slot.key[0]; });
  Slot* slot = empty < set + (1 << kWayBits) ? empty : set + (random >> (64 - kWayBits));
  std::copy(key, key + words, slot->key);
  slot->map = map;
}

uint64_t next_id() {
  static std::atomic<uint64_t> last{0};
  return ++last;
}

}  // namespace

TensorMapMaker::TensorMapMaker(const std::string& kernel, const Param& param, const Driver& driver)
    : param_(param), id_(next_id()), encode_(driver.tensor_map_encode) {
  const TensorMapSpec& spec = param.map;
  const auto type = static_cast<size_t>(spec.type);
  HD_CHECK_BUNDLE(param.kind == ParamKind::kTensorMap && param.align == kAlignment && type < std::size(kTypeBytes),
                  kernel, ": ", param.name, " is no tensor map that hdispatch can make");
  const std::string what = text(kernel, ": the tensor map of ", param.name);
  rank_ = static_cast<uint32_t>(spec.shape.size());
  HD_CHECK_BUNDLE(rank_ >= 1 && rank_ <= kMaxMapRank && spec.strides.size() + 1 == rank_ && spec.box.size() == rank_,
                  what, " has ", spec.shape.size(), " sizes, ", spec.strides.size(), " strides and a box of ",
                  spec.box.size(), "; it takes 1 to ", kMaxMapRank, " sizes, one stride fewer, and a box as long");
  for (uint32_t i = 0; i < rank_; ++i) {
    box_[i] = spec.box[rank_ - 1 - i];
    HD_CHECK_BUNDLE(box_[i] >= 1 && box_[i] <= kMaxBox, what, " has a box of ", box_[i],
                    " elements in one dimension; it takes 1 to ", kMaxBox);
  }
  element_bytes_ = kTypeBytes[type];
  const uint32_t width = box_[0] * element_bytes_;
  const uint32_t swizzles[] = {0, 32, 64, 128};
  swizzle_ = static_cast<int>(std::ranges::find(swizzles, spec.swizzle) - swizzles);
  HD_CHECK_BUNDLE(swizzle_ < 4, what, " has a swizzle of ", spec.swizzle, " bytes; it takes 0, 32, 64 or 128");
  HD_CHECK_BUNDLE(width % kAlignment == 0 && (!spec.swizzle || width <= spec.swizzle), what, " has a box ", width,
                  " bytes wide; it takes a multiple of 16 bytes, not wider than its swizzle of ", spec.swizzle);
  for (uint32_t i = 0; i < rank_; ++i) {
    const uint32_t own = rank_ - 1 - i;
    add_value(spec.shape[own], static_cast<uint8_t>(i));
    if (i + 1 < rank_) add_value(spec.strides[own - 1], static_cast<uint8_t>(kMaxMapRank + i));
  }
  int version = 0;
  if (driver.driver_version(&version) == kCudaSuccess) clear_bit_85_ = version > 0 && version <= kLastWithBit85;
  key_words_ = static_cast<uint32_t>(2 + computed_.size());
}

void TensorMapMaker::add_value(const Expr& expr, uint8_t place) {
  int64_t& constant = place < kMaxMapRank ? constants_.dims[place] : constants_.strides[place - kMaxMapRank];
  if (!expr.is_constant() || !expr.evaluate(Call{}, constant)) computed_.push_back({&expr, place});
}

bool TensorMapMaker::read_key(const Call& call, uint64_t* key) const noexcept {
  int64_t value = 0;
  if (!param_.value.evaluate(call, value)) return false;
  *key++ = id_;
  *key++ = call.tensors[param_.arg].data + static_cast<uint64_t>(value);
  for (const Computed& item : computed_) {
    if (!item.expr->evaluate(call, value)) return false;
    *key++ = static_cast<uint64_t>(value);
  }
  return true;
}

bool TensorMapMaker::make(const Call& call, TensorMap& out) const noexcept {
  uint64_t key[kMaxKeyWords];
  if (HD_UNLIKELY(!read_key(call, key))) return false;
  const Slot* slot = HD_LIKELY(slots != nullptr) ? find(key, key_words_) : nullptr;
  if (HD_UNLIKELY(!slot)) return make_new(key, out);
  out = slot->map;
  return true;
}

HD_COLD bool TensorMapMaker::make_new(const uint64_t* key, TensorMap& out) const noexcept {
  const Values values = values_of(key);
  if (!follows_rules(values) || encode(values, out) != kCudaSuccess) return false;
  if (slots || open_cache()) insert(key, key_words_, out);
  return true;
}

// ---- encoding ----

TensorMapMaker::Values TensorMapMaker::values_of(const uint64_t* key) const noexcept {
  Values values = constants_;
  values.address = *++key;
  for (const Computed& item : computed_) {
    const auto value = static_cast<int64_t>(*++key);
    if (item.place < kMaxMapRank)
      values.dims[item.place] = value;
    else
      values.strides[item.place - kMaxMapRank] = value;
  }
  return values;
}

bool TensorMapMaker::follows_rules(const Values& values) const noexcept {
  bool good = values.address % kAlignment == 0;
  for (uint32_t i = 0; i < rank_; ++i) good &= values.dims[i] >= 1 && values.dims[i] <= kMaxSize;
  for (uint32_t i = 0; i + 1 < rank_; ++i) {
    const int64_t stride = values.strides[i];
    good &= stride >= 0 && stride < kMaxStrideBytes / element_bytes_ && stride * element_bytes_ % kAlignment == 0;
  }
  return good;
}

CUresult TensorMapMaker::encode(const Values& values, TensorMap& out) const noexcept {
  constexpr uint32_t kOnes[kMaxMapRank] = {1, 1, 1, 1, 1};
  uint64_t dims[kMaxMapRank] = {};
  uint64_t strides[kMaxMapRank] = {};
  double last_byte = element_bytes_;  // a double, because sizes times strides may exceed 64 bits
  for (uint32_t i = 0; i < rank_; ++i) {
    dims[i] = static_cast<uint64_t>(values.dims[i]);
    if (i + 1 < rank_) strides[i] = static_cast<uint64_t>(values.strides[i]) * element_bytes_;
    last_byte += static_cast<double>(dims[i] - 1) * static_cast<double>(i ? strides[i - 1] : element_bytes_);
  }
  const TensorMapSpec& spec = param_.map;
  const CUresult result =
      encode_(&out, spec.type, rank_, reinterpret_cast<void*>(values.address), dims, strides, box_, kOnes,
              kMapInterleaveNone, swizzle_, kMapL2Promotion128, spec.fill_nan ? kMapFillNan : kMapFillZero);
  if (clear_bit_85_ && last_byte < kSmallBytes) out.words[1] &= ~(uint64_t{1} << 21);
  return result;
}

std::string TensorMapMaker::objection(const Call& call) const {
  uint64_t key[kMaxKeyWords];
  if (!read_key(call, key)) return "a size or stride has no value";
  const Values values = values_of(key);
  TensorMap map;
  if (follows_rules(values)) return text("cuTensorMapEncodeTiled answers ", encode(values, map));
  std::string out = text("address ", Hex{values.address}, ", sizes [");
  for (uint32_t i = rank_; i-- > 0;) out += text(values.dims[i], i ? ", " : "], strides [");
  for (uint32_t i = rank_ - 1; i-- > 0;) out += text(values.strides[i], ", ");
  return out + text("1] of ", element_bytes_,
                    "-byte elements; it takes sizes from 1 to 2^32, and an address and strides that are multiples of ",
                    kAlignment, " bytes, strides below 2^40 bytes");
}

}  // namespace hdispatch
