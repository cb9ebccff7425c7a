// tensor_map.h -- a call -> the TMA descriptor (CUtensorMap) of one kernel parameter, cached by what it is made of.
//
// A map holds an address, sizes and strides, and nothing of the memory behind them: the same numbers give the same map,
// whoever owns the memory by then. So a cache of values needs no invalidation.
#pragma once

#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include "call.h"
#include "driver.h"
#include "record.h"

namespace hdispatch {

/// Makes the maps of one parameter. `make` may run on any number of threads.
class TensorMapMaker {
 public:
  static constexpr uint32_t kSets = 32;  ///< of the cache
  static constexpr uint32_t kWays = 4;   ///< maps that one set holds

  /// `param` is a kTensorMap and outlives this. Throws kBundle for a map that no call could have.
  TensorMapMaker(const std::string& kernel, const Param& param, const Driver& driver);

  /// The call's map into `out`. False if it cannot be: `objection` says why. A map that is cached costs no driver call;
  /// no thread ever waits, and nothing is allocated.
  bool make(const Call& call, TensorMap& out) const noexcept;

  /// The rule that the call's map breaks, with the values.
  std::string objection(const Call& call) const;

 private:
  static constexpr uint32_t kMapWords = sizeof(TensorMap) / sizeof(uint64_t);
  static constexpr uint32_t kMaxKeyWords = 1 + kMaxMapRank + kMaxMapRank - 1;

  /// Arguments of cuTensorMapEncodeTiled, innermost dimension first.
  struct Values {
    uint64_t address = 0;
    int64_t dims[kMaxMapRank] = {};
    int64_t strides[kMaxMapRank - 1] = {};  ///< elements
  };
  struct Computed {  ///< a size or stride that is not constant
    const Expr* expr;
    uint8_t place;  ///< index in Values::dims, or kMaxMapRank + index in Values::strides
  };
  struct Unmap {
    size_t bytes;
    void operator()(uint64_t* slots) const noexcept;
  };

  void add_value(const Expr& expr, uint8_t place);
  bool read_key(const Call& call, uint64_t* key) const noexcept;
  Values values_of(const uint64_t* key) const noexcept;
  std::string broken_rule(const Values& values) const;
  bool follows_rules(const Values& values) const noexcept;
  CUresult encode(const Values& values, TensorMap& out) const noexcept;
  uint64_t* set_of(const uint64_t* key) const noexcept;
  bool find(uint64_t* set, const uint64_t* key, TensorMap& out) const noexcept;
  bool make_new(uint64_t* set, const uint64_t* key, TensorMap& out) const noexcept;
  void insert(uint64_t* set, const uint64_t* key, const TensorMap& map) const noexcept;

  const Param& param_;
  decltype(Driver::tensor_map_encode) encode_;
  uint32_t rank_;
  uint32_t element_bytes_;
  int swizzle_;
  bool clear_bit_85_ = false;
  uint32_t box_[kMaxMapRank] = {};  ///< innermost dimension first
  Values constants_;
  std::vector<Computed> computed_;
  uint32_t key_words_ = 0;   ///< the address and what is computed
  uint32_t map_offset_ = 0;  ///< of the map in its slot: after the sequence number and the key
  uint32_t slot_words_ = 0;
  /// kSets * kWays slots. A slot is a sequence number (0: empty; odd: being written), key words, the map.
  std::unique_ptr<uint64_t, Unmap> slots_;
  mutable std::atomic_flag writing_;  ///< held by the one thread that changes the slots
  mutable uint64_t random_ = 1;       ///< whose turn it is to be replaced; guarded by `writing_`
};

}  // namespace hdispatch
