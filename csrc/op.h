// op.h -- an op: its arguments, what they must satisfy, and how a call becomes a key.
//
// Built from the Python declaration (opspec.py) when the op is defined, then frozen; any thread may read it. `bind` is
// the hot path: it checks a whole call and computes M, K, N and the variant without building a message. When it returns
// false, `complain` walks the same rules in words and throws.
#pragma once

#include <atomic>
#include <cstdint>
#include <limits>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "call.h"
#include "key.h"

namespace hdispatch {

/// One dimension of a tensor argument: `factor * symbol`, or exactly `factor` where symbol is kSymbols.
struct Dim {
  int64_t factor = 1;
  uint8_t symbol = kSymbols;
  bool binds = false;  ///< this occurrence gives the symbol its value; all others are checked against it
};

struct ArgSpec {
  std::string name;
  bool is_tensor = true;
  // tensors
  std::vector<Dim> dims;
  std::vector<DType> dtypes;  ///< accepted by themselves; which combinations exist say the variants
  bool is_mutated = false;
  bool is_optional = false;
  bool is_row_strided = false;  ///< the first dimension's stride is free; otherwise contiguous
  // scalars: a finite float of at least
  double minimum = -std::numeric_limits<double>::infinity();
};

/// One combination of dtypes and absent optional arguments. Its index in Op::variants is the key's.
struct Variant {
  std::string name;
  uint64_t signature = 0;  ///< DType of argument i in bits 4i..4i+3; 0 for scalars and absent tensors
};

/// What one op has done since the start. Hits are counted lock-free; the rest is off the hot path.
struct OpCounters {
  std::atomic<uint64_t> hits{0};           ///< launches
  std::atomic<uint64_t> empty{0};          ///< calls with M = 0: nothing to launch
  std::atomic<uint64_t> fallbacks{0};      ///< misses that the fallback served (strict mode raises instead)
  std::mutex mutex;                        ///< guards `misses`
  std::map<std::string, uint64_t> misses;  ///< by reason
};

class Op {
 public:
  /// Throws kBundle if the declaration cannot be dispatched. `id` is unique in the process.
  Op(uint16_t id, std::string name, std::string schema, std::vector<ArgSpec> args, std::vector<Variant> variants);

  /// Checks the call and sets call.sizes. False: something is wrong with an argument; see `complain`.
  /// `slot` is where all tensors live. Strides of dimensions of size <= 1 are made those of a contiguous tensor.
  bool bind(Call& call, uint16_t& variant, DeviceSlot& slot) const noexcept;

  /// Throws kCaller with the first rule that the call breaks: the argument, what it got and what it takes.
  [[noreturn]] void complain(const Call& call) const;

  int find_tensor(std::string_view name) const noexcept;  ///< argument index or -1
  int find_scalar(std::string_view name) const noexcept;
  int find_variant(std::string_view name) const noexcept;

  uint16_t id() const noexcept { return id_; }
  const std::string& name() const noexcept { return name_; }
  const std::string& schema() const noexcept { return schema_; }
  const std::vector<ArgSpec>& args() const noexcept { return args_; }
  const std::vector<Variant>& variants() const noexcept { return variants_; }
  /// Indices of the arguments that the op writes.
  const std::vector<uint8_t>& mutated() const noexcept { return mutated_; }
  OpCounters& counters() const noexcept { return counters_; }

 private:
  /// What `bind` reads, packed: walking ArgSpec, which is for people, costs twice the time.
  struct TensorRule {
    uint8_t arg;
    uint8_t rank;
    bool is_row_strided;
    bool is_mutated;
    bool is_one_element;
    uint8_t symbol[kMaxRank];  ///< a dimension's size is factor * sizes[symbol]; sizes[kSymbols] is 1
    int64_t factor[kMaxRank];
  };
  struct Check {  ///< one dimension to compare, flattened over the tensors
    uint8_t arg;
    uint8_t dimension;
    uint8_t symbol;  ///< kSymbols: the size is `factor`
    int64_t factor;
  };
  struct ScalarRule {
    uint8_t arg;
    double minimum;
  };

  bool bind_symbols(Call& call) const noexcept;
  template <uint32_t kRank>
  static bool accept(const TensorRule& rule, TensorView& view, const int64_t* sizes) noexcept;

  uint16_t id_;
  std::string name_;
  std::string schema_;
  std::vector<ArgSpec> args_;
  std::vector<Variant> variants_;
  std::vector<uint64_t> signatures_;  ///< of the variants, side by side
  std::vector<TensorRule> tensors_;
  std::vector<ScalarRule> scalars_;
  std::vector<Check> binders_;  ///< the occurrences that bind
  std::vector<Check> checks_;   ///< all others
  std::vector<uint8_t> mutated_;
  mutable OpCounters counters_;
};

}  // namespace hdispatch
