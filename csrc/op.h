// op.h -- an op: its arguments, what they must satisfy, and how a call becomes a key.
//
// Built from the Python declaration (opspec.py) when the op is defined, then frozen; any thread may read it. `bind` is
// the hot path: it checks a whole call and computes M, K, N and the variant without building a message. When it returns
// false, `complain` walks the same rules again, builds the message and throws.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <limits>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "call.h"
#include "check.h"
#include "fork_mutex.h"
#include "key.h"

namespace hdispatch {

/// One dimension of a tensor argument: `factor * symbol / divisor` rounded up; `factor` where symbol is kSymbols.
struct Dim {
  int64_t factor = 1;
  uint8_t symbol = kSymbols;
  bool binds = false;    ///< this occurrence gives the symbol its value; all others are checked against it
  bool any = false;      ///< any size; nothing else is set
  int64_t divisor = 1;   ///< or, with divisor_arg,
  int divisor_arg = -1;  ///< the value of that integer argument
};

enum class ArgKind : uint8_t { kTensor, kFloat, kInteger, kBool, kNone, kString };

/// Which strides of a tensor are free. Those of dimensions of size <= 1 mean nothing.
enum class Layout : uint8_t {
  kContiguous,
  kRows,     ///< the first dimension's; of a tensor that is written at least a row's width
  kColumns,  ///< rank 2: the first dimension is contiguous, the second one's is free likewise
  kAny,      ///< all
};

struct ArgSpec {
  std::string name;
  ArgKind kind = ArgKind::kTensor;
  // tensors
  std::vector<Dim> dims;
  std::vector<DType> dtypes;  ///< accepted by themselves; which combinations exist say the variants
  bool is_mutated = false;
  bool is_optional = false;
  bool is_returned = false;  ///< allocated by the functional form of the op: see functional_op.h
  bool is_zeroed = false;    ///< with is_returned: it is zero when the kernel begins
  int dtype_of = -1;         ///< index of the argument whose dtype it has; -1: of its own
  Layout layout = Layout::kContiguous;
  bool is_flat = false;       ///< rank 1: a contiguous tensor of any rank with as many elements
  bool is_broadcast = false;  ///< with is_flat: one element serves too, as a tensor of stride 0
  bool is_padded = false;     ///< lower ranks get dimensions of size 1 after the first
  bool is_merged = false;     ///< of higher ranks the leading dimensions are merged; of rank 2 those of M elements
  int in_place_of = -1;       ///< index of the argument that may be the same view, which is then overwritten
  // floats: finite and at least
  double minimum = -std::numeric_limits<double>::infinity();
  // integers, flags and strings
  int64_t least = INT64_MIN;
  std::vector<int64_t> values;     ///< compiled in: any other is a miss; empty: all are served
  std::vector<std::string> texts;  ///< of kString, whose `values` are the positions in it
  int64_t default_value = 0;
  bool has_default = false;
  bool has_ladder = false;  ///< of kInteger without values: bucketed in the key, beside M
  bool is_ignored = false;  ///< of kNone: anything is served, and no variant depends on it

  bool is_tensor() const noexcept { return kind == ArgKind::kTensor; }
  /// What a call holds of a string: its position among the values; -1 for one that is not listed.
  int64_t position(const Text& given) const noexcept {
    const std::string_view text(given.data, given.size);
    for (size_t i = 0; i < texts.size(); ++i)
      if (texts[i] == text) return static_cast<int64_t>(i);
    return -1;
  }
};

/// Four bits of each argument: the DType of a tensor, 0 if absent; 1 + the position of a compiled-in value; else 0.
/// Two words in registers: an index into an array would go through memory with every tensor.
class Signature {
 public:
  constexpr void set(uint32_t arg, uint64_t nibble) noexcept {
    const uint64_t bits = nibble << (4 * (arg & 15));
    low_ |= arg < 16 ? bits : 0;
    high_ |= arg < 16 ? 0 : bits;
  }
  constexpr uint64_t get(uint32_t arg) const noexcept { return (arg < 16 ? low_ : high_) >> (4 * (arg & 15)) & 15; }
  /// Whether the other is the same but for the nibbles that are not 0 in the mask.
  constexpr bool same_but(const Signature& mask, const Signature& other) const noexcept {
    return (((low_ ^ other.low_) & ~mask.low_) | ((high_ ^ other.high_) & ~mask.high_)) == 0;
  }
  friend constexpr bool operator==(const Signature& a, const Signature& b) noexcept {
    return ((a.low_ ^ b.low_) | (a.high_ ^ b.high_)) == 0;
  }

 private:
  uint64_t low_ = 0;
  uint64_t high_ = 0;
};
static_assert(kMaxArgs <= 32, "a signature holds 32 arguments");

/// One combination of dtypes and absent optional arguments. Its index in Op::variants is the key's.
struct Variant {
  std::string name;
  Signature signature;
  uint64_t workspace_bytes = 0;  ///< of memory of the runtime's that its kernels get
};

/// What one op has done since the start. Hits are counted lock-free; the rest is off the hot path.
struct OpCounters {
  std::atomic<uint64_t> hits{0};           ///< launches
  std::atomic<uint64_t> empty{0};          ///< calls with M = 0: nothing to launch
  std::atomic<uint64_t> fallbacks{0};      ///< misses that the fallback served (strict mode raises instead)
  static ForkMutex mutex;                  ///< guards every op's `misses`
  std::map<std::string, uint64_t> misses;  ///< by reason
};

/// What `Op::bind` finds.
enum class Bound : uint8_t {
  kYes,
  kWrong,     ///< an argument breaks a rule: Op::complain says which
  kUnserved,  ///< nothing is wrong, but no variant has the values that are given
};

class Op {
 public:
  /// Throws kBundle if the declaration cannot be dispatched. `id` is unique in the process.
  /// `workspace`: the name by which kernels take the memory that some variants ask for; empty where none does.
  Op(uint16_t id, std::string name, std::string schema, std::vector<ArgSpec> args, std::vector<Variant> variants,
     std::string workspace = {});

  /// Checks the call and sets call.sizes. `slot` is where all tensors live. Views become what the declaration says:
  /// flattened, padded, broadcast; strides of dimensions of size <= 1 are made those of a contiguous tensor.
  Bound bind(Call& call, uint16_t& variant, DeviceSlot& slot) const noexcept;

  /// Whether what the op writes shares no memory with its other arguments, and every tensor's storage is there. Of a
  /// call that `bind` took.
  bool has_memory(const Call& call) const noexcept;

  /// Throws kCaller with the first rule that the call breaks: the argument, what it got and what it takes.
  [[noreturn]] void complain(const Call& call) const;
  /// The same without values, to count by: "scale: dtype".
  std::string reason(const Call& call) const;
  /// Names the values that no variant has.
  std::string unserved(const Call& call) const;
  /// The first argument whose value no variant has.
  const std::string& unserved_argument(const Call& call) const;

  int find_tensor(std::string_view name) const noexcept;  ///< argument index or -1
  int find_memory(std::string_view name) const noexcept;  ///< the same; of the workspace too
  int find_float(std::string_view name) const noexcept;
  int find_integer(std::string_view name) const noexcept;
  int find_variant(std::string_view name) const noexcept;

  /// Whether a tensor carries the size; if none does it is 0 in every key.
  bool has(Symbol symbol) const noexcept { return has_[symbol]; }

  /// By what index and name records take the workspace, as a tensor; -1 for an op without one.
  int workspace() const noexcept { return workspace_.empty() ? -1 : static_cast<int>(args_.size()); }
  const std::string& workspace_name() const noexcept { return workspace_; }
  /// Makes memory the call's workspace, for an op that has one: a 1-D tensor of bytes; absent if there are none.
  void set_workspace(Call& call, DeviceSlot slot, uintptr_t address, uint64_t bytes) const noexcept {
    TensorView& view = call.tensors[args_.size()];
    view.data = view.storage = address;
    view.sizes[0] = static_cast<int64_t>(bytes);
    view.strides[0] = 1;
    view.slot = slot;
    view.rank = 1;
    view.dtype = bytes ? DType::kUInt8 : DType::kNone;
  }

  /// The integer argument that has a ladder beside M's; -1 for none.
  int second() const noexcept { return second_; }

  uint16_t id() const noexcept { return id_; }
  const std::string& name() const noexcept { return name_; }
  const std::string& schema() const noexcept { return schema_; }
  const std::vector<ArgSpec>& args() const noexcept { return args_; }
  const std::vector<Variant>& variants() const noexcept { return variants_; }
  /// Indices of the arguments that the op writes.
  const std::vector<uint8_t>& mutated() const noexcept { return mutated_; }
  /// Whether there is something to write without rows: an output has no dimension of M.
  bool writes_without_rows() const noexcept { return writes_without_rows_; }
  OpCounters& counters() const noexcept { return counters_; }

 private:
  /// What `bind` reads, packed: walking ArgSpec, which is for people, costs twice the time.
  struct TensorRule {
    uint8_t arg;
    uint8_t rank;
    uint8_t free_strides;  ///< bit d: dimension d's
    uint8_t any_sizes;     ///< bit d: dimension d's
    bool is_mutated;
    bool is_one_element;
    bool is_columns;
    bool is_broadcast;
    uint8_t symbol[kMaxRank];  ///< a dimension's size is factor * sizes[symbol]; sizes[kSymbols] is 1
    int64_t factor[kMaxRank];
  };
  struct Check {  ///< one dimension to compare, flattened over the tensors
    uint8_t arg;
    uint8_t dimension;
    uint8_t symbol;  ///< index in Call::sizes
    int64_t factor;
  };
  struct Derived {  ///< Call::sizes[kSymbols + 1 + i] = factor * sizes[symbol] / divisor, rounded up
    uint8_t symbol;
    int64_t factor;
    int64_t divisor;
    int divisor_arg;
  };
  struct ScalarRule {
    uint8_t arg;
    double minimum;
  };
  struct Reshape {  ///< a tensor that is flattened, or padded or merged to `rank`
    uint8_t arg;
    uint8_t rank;
    bool is_flat;
    bool is_padded;
    bool is_merged;
  };

  void add_tensor(uint8_t index, const std::array<int, kSymbols>& binders);
  uint8_t derive(const Dim& dim);
  bool reshape(Call& call) const noexcept;
  const char* reshape(const Reshape& item, Call& call) const noexcept;
  bool lacks_memory(const Call& call) const noexcept;
  template <typename Say>
  std::string first_fault(Call call, const Say& say) const;
  template <typename Say>
  std::string memory_fault(const Call& call, const Say& say) const;
  template <typename Say>
  std::string layout_fault(const TensorRule& rule, const TensorView& view, const Say& say) const;
  template <typename Say>
  std::string size_fault(Call& call, const Say& say) const;
  template <typename Say>
  std::string variant_fault(const Call& call, const Say& say) const;
  const ArgSpec& odd_one(const Signature& signature) const;
  bool bind_symbols(Call& call) const noexcept;
  bool bind_tensors(Call& call, DeviceSlot slot, Signature& signature) const noexcept;
  bool bind_scalars(const Call& call, Signature& signature) const noexcept;
  bool is_unlisted(const Signature& signature) const noexcept;
  template <uint32_t kRank>
  static bool accept(const TensorRule& rule, TensorView& view, const int64_t* sizes) noexcept;

  uint16_t id_;
  std::string name_;
  std::string schema_;
  std::vector<ArgSpec> args_;
  std::vector<Variant> variants_;
  std::array<bool, kSymbols> has_{};
  std::string workspace_;
  int second_ = -1;
  uint8_t first_ = 0;            ///< the argument that gives M, which every call has
  uint8_t first_dimension_ = 0;  ///< the dimension of it that is M
  bool writes_without_rows_ = false;
  std::vector<uint8_t> read_;          ///< the tensors that are only read
  std::vector<Signature> signatures_;  ///< of the variants, side by side
  std::vector<TensorRule> tensors_;
  std::vector<Reshape> reshapes_;
  std::vector<Derived> derived_;
  std::vector<ScalarRule> scalars_;
  std::vector<uint8_t> integers_;  ///< integers, flags, strings and what is served as None only
  Signature integer_bits_;         ///< their nibbles of a signature, all ones
  std::vector<Check> binders_;     ///< the occurrences that bind
  std::vector<Check> checks_;      ///< all others
  std::vector<uint8_t> mutated_;
  mutable OpCounters counters_;
};

/// As torch, by storages: only where two are one are addresses compared, out of line. Three outputs in registers and
/// branches that are not taken cost 3 ns; loops over all pairs 9.
inline bool Op::has_memory(const Call& call) const noexcept {
  const size_t written = mutated_.size();
  const auto storage = [&call](uint8_t arg) { return call.tensors[arg].storage; };
  const uintptr_t a = written > 0 ? storage(mutated_[0]) : ~uintptr_t{0};
  const uintptr_t b = written > 1 ? storage(mutated_[1]) : ~uintptr_t{1};
  const uintptr_t c = written > 2 ? storage(mutated_[2]) : ~uintptr_t{2};
  if (HD_UNLIKELY(written > 3 || !a || !b || !c || a == b || a == c || b == c)) return !lacks_memory(call);
  for (const uint8_t arg : read_) {
    const uintptr_t read = storage(arg);
    if (HD_UNLIKELY(!read || read == a || read == b || read == c)) return !lacks_memory(call);
  }
  return true;
}

}  // namespace hdispatch
