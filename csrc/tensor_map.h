// tensor_map.h -- a call -> the TMA descriptor (CUtensorMap) of one kernel parameter, cached by what it is made of.
//
// A map holds an address, sizes and strides, and nothing of the memory behind them: the same numbers give the same map,
// whoever owns the memory by then. So a cache of values needs no invalidation. Each thread has one of its own, of
// bounded size: no lock, and no thread sees what another writes.
#pragma once

#include <string>
#include <vector>

#include "call.h"
#include "driver.h"
#include "record.h"

namespace hdispatch {

/// Makes the maps of one parameter. `make` may run on any number of threads.
class TensorMapMaker {
 public:
  /// `param` is a kTensorMap and outlives this. Throws kBundle for a map that no call could have.
  TensorMapMaker(const std::string& kernel, const Param& param, const Driver& driver);

  /// The call's map into `out`. False if it cannot be: `objection` says why. What is cached costs no driver call.
  bool make(const Call& call, TensorMap& out) const noexcept;

  /// The rule that the call's map breaks, with the values.
  std::string objection(const Call& call) const;

 private:
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

  void add_value(const Expr& expr, uint8_t place);
  bool read_key(const Call& call, uint64_t* key) const noexcept;
  bool make_new(const uint64_t* key, TensorMap& out) const noexcept;
  Values values_of(const uint64_t* key) const noexcept;
  bool follows_rules(const Values& values) const noexcept;
  CUresult encode(const Values& values, TensorMap& out) const noexcept;

  const Param& param_;
  const uint64_t id_;  ///< of no other maker, also of none before; not 0
  decltype(Driver::tensor_map_encode) encode_;
  uint32_t rank_;
  uint32_t element_bytes_;
  int swizzle_;
  bool clear_bit_85_ = false;
  uint32_t box_[kMaxMapRank] = {};  ///< innermost dimension first
  Values constants_;
  std::vector<Computed> computed_;
  uint32_t key_words_ = 0;  ///< id, address, and what is computed
};

}  // namespace hdispatch
