// op.cpp -- checking a call against an op's declaration.
#include "op.h"

#include <algorithm>
#include <cmath>

#include "check.h"
#include "overlap.h"

namespace hdispatch {

ForkMutex OpCounters::mutex;
namespace {

constexpr const char* kSymbolNames[] = {"M", "K", "N"};
constexpr uint8_t kAllStrides = 15;  ///< of TensorRule::free_strides
constexpr uint64_t kUnlisted = 15;   ///< nibble of a value that is not compiled in; no variant has it

// What messages print, put into words only when they are wanted.
struct Dims {
  const ArgSpec& arg;
  const std::vector<ArgSpec>& args;
};
struct Sizes {
  const TensorView& view;
};
struct Slot {
  DeviceSlot slot;
};
struct Quoted {
  Text text;
};

std::string print_dim(const Dim& dim, const std::vector<ArgSpec>& args) {
  if (dim.any) return "*";
  std::string out = dim.symbol == kSymbols
                        ? std::to_string(dim.factor)
                        : (dim.factor == 1 ? "" : std::to_string(dim.factor) + "*") + kSymbolNames[dim.symbol];
  if (dim.divisor_arg >= 0) return out + "/" + args[static_cast<size_t>(dim.divisor_arg)].name;
  return dim.divisor == 1 ? out : out + "/" + std::to_string(dim.divisor);
}

void append(std::string& out, const Dims& dims) {
  out += "[";
  for (size_t d = 0; d < dims.arg.dims.size(); ++d) out += (d ? ", " : "") + print_dim(dims.arg.dims[d], dims.args);
  out += "]";
}

void append(std::string& out, const Sizes& sizes) {
  const TensorView& view = sizes.view;
  out += "[";
  for (uint32_t i = 0; i < std::min(view.rank, kMaxRank); ++i) out += (i ? ", " : "") + std::to_string(view.sizes[i]);
  out += view.rank > kMaxRank ? ", ...]" : "]";
}

void append(std::string& out, const Slot& slot) {
  if (slot.slot == kCpuSlot)
    out += "cpu";
  else
    out += slot.slot == kNoSlot ? "another device" : "cuda:" + std::to_string(slot.slot - 1);
}

/// The beginning of a string in quotes, cut between characters; what is not printed, NUL too, as \xNN.
void append(std::string& out, const Quoted& quoted) {
  constexpr size_t kMost = 100;
  const char* const bytes = quoted.text.data;
  size_t end = std::min(quoted.text.size, kMost);
  while (end < quoted.text.size && end > 0 && (bytes[end] & 0xc0) == 0x80) --end;
  out += '"';
  for (size_t i = 0; i < end; ++i) {
    const auto byte = static_cast<unsigned char>(bytes[i]);
    constexpr const char* kDigits = "0123456789abcdef";
    if (byte < 0x20 || byte == 0x7f)
      out += {'\\', 'x', kDigits[byte >> 4], kDigits[byte & 15]};
    else
      out += bytes[i];
  }
  out += end < quoted.text.size ? "\"..." : "\"";
}

const char* print_layout(Layout layout) {
  switch (layout) {
    case Layout::kRows:
      return "only stride(0) is free";
    case Layout::kColumns:
      return "column-major: only stride(1) is free";
    default:
      return "contiguous";
  }
}

constexpr double kMaxFloat32 = 3.4028234663852886e38;

/// Wraps: sizes with a product beyond int64 are those of a tensor without elements.
int64_t times(int64_t a, int64_t b) {
  return static_cast<int64_t>(static_cast<uint64_t>(a) * static_cast<uint64_t>(b));
}

/// False for NaN too.
bool in_range(double value, double minimum) { return value >= minimum && std::abs(value) <= kMaxFloat32; }

/// What is wrong with an argument, or with the call as a whole, for a person.
struct Words {
  const std::string& op;
  template <typename... Parts>
  std::string operator()(const ArgSpec& arg, const char*, const Parts&... parts) const {
    return text(op, ": ", arg.name, " ", parts...);
  }
  template <typename... Parts>
  std::string call(const ArgSpec&, const char*, const Parts&... parts) const {
    return text(op, ": ", parts...);
  }
};

/// The same to count by: the argument and the kind of mismatch.
struct Reason {
  template <typename... Parts>
  std::string operator()(const ArgSpec& arg, const char* kind, const Parts&...) const {
    return arg.name + ": " + kind;
  }
  template <typename... Parts>
  std::string call(const ArgSpec& arg, const char* kind, const Parts&...) const {
    return arg.name + ": " + kind;
  }
};

std::string_view or_empty(const char* given) { return given ? given : ""; }

/// A one-element argument may have rank 0, as torch makes them.
bool is_one_element(const ArgSpec& arg) {
  return arg.dims.size() == 1 && arg.dims[0].symbol == kSymbols && !arg.dims[0].any && arg.dims[0].factor == 1;
}

uint8_t free_strides(const ArgSpec& arg) {
  switch (arg.layout) {
    case Layout::kRows:
      return arg.dims.size() > 1 ? 1 : 0;
    case Layout::kColumns:
      return 2;
    case Layout::kAny:
      return kAllStrides;
    default:
      return 0;
  }
}

bool is_contiguous(const TensorView& view) {
  int64_t contiguous = 1;
  for (uint32_t d = view.rank; d-- > 0;) {
    if (view.sizes[d] > 1 && view.strides[d] != contiguous) return false;
    contiguous = times(contiguous, std::max<int64_t>(view.sizes[d], 1));
  }
  return true;
}

/// Any rank -> rank 1. Contiguous, or without elements.
bool flatten(TensorView& view) {
  if (view.rank > kMaxRank) return false;
  int64_t count = 1;
  for (uint32_t d = 0; d < view.rank; ++d) count = times(count, view.sizes[d]);
  if (count > 1 && !is_contiguous(view)) return false;
  view.rank = 1;
  view.sizes[0] = count;
  view.strides[0] = 1;
  return true;
}

/// Dimensions from `first` up to `past`, of `count` elements, become one, if their strides allow it.
bool merge(TensorView& view, uint32_t first, uint32_t past) {
  int64_t count = 1, stride = 1;
  for (uint32_t d = past; d-- > first;) {
    if (view.sizes[d] == 1) continue;
    if (count == 1)
      stride = view.strides[d];
    else if (view.strides[d] != times(stride, count) && count != 0 && view.sizes[d] != 0)
      return false;
    count = times(count, view.sizes[d]);
  }
  view.sizes[first] = count;
  view.strides[first] = stride;
  for (uint32_t d = past; d < view.rank; ++d) {
    view.sizes[d - past + first + 1] = view.sizes[d];
    view.strides[d - past + first + 1] = view.strides[d];
  }
  view.rank -= past - first - 1;
  return true;
}

/// A higher rank -> `rank`: the leading dimensions become one; of rank 2 those of M elements, if M is known, and those
/// after them another. What hinders it; null if nothing does.
const char* merge(TensorView& view, uint32_t rank, int64_t m) {
  if (view.rank > kMaxRank) return "rank";
  uint32_t leading = view.rank - rank + 1;
  if (rank == 2 && m >= 0) {
    int64_t count = view.sizes[0];
    for (leading = 1; count != m && leading < view.rank - 1; ++leading) count = times(count, view.sizes[leading]);
    if (count != m) return "size";
  }
  if (!merge(view, 0, leading)) return "strides";
  return view.rank == rank || merge(view, rank - 1, view.rank) ? nullptr : "strides";
}

/// Dimensions of size 1 after the first, up to `rank`.
bool pad(TensorView& view, uint32_t rank) {
  if (view.rank > rank || view.rank < 2) return view.rank == rank;
  const uint32_t added = rank - view.rank;
  for (uint32_t d = rank; d-- > 1 + added;) {
    view.sizes[d] = view.sizes[d - added];
    view.strides[d] = view.strides[d - added];
  }
  for (uint32_t d = 1; d <= added; ++d) {
    view.sizes[d] = 1;
    view.strides[d] = 1;
  }
  view.rank = rank;
  return true;
}

/// The declaration's own order of preference: required and only read; required; optional.
std::array<int, kSymbols> find_binders(const std::vector<ArgSpec>& args) {
  std::array<int, kSymbols> found = {-1, -1, -1};
  for (int pass = 0; pass < 3; ++pass)
    for (size_t i = 0; i < args.size(); ++i) {
      const ArgSpec& arg = args[i];
      if (!arg.is_tensor() || arg.is_broadcast || (pass < 2 && arg.is_optional) || (pass < 1 && arg.is_mutated))
        continue;
      for (const Dim& dim : arg.dims)
        if (!dim.any && dim.symbol < kSymbols && dim.divisor == 1 && dim.divisor_arg < 0 && found[dim.symbol] < 0)
          found[dim.symbol] = static_cast<int>(i);
    }
  return found;
}

}  // namespace

Op::Op(uint16_t id, std::string name, std::string schema, std::vector<ArgSpec> args, std::vector<Variant> variants,
       std::string workspace)
    : id_(id),
      name_(std::move(name)),
      schema_(std::move(schema)),
      args_(std::move(args)),
      variants_(std::move(variants)),
      workspace_(std::move(workspace)) {
  HD_CHECK_BUNDLE(args_.size() <= kMaxArgs, name_, ": ", args_.size(), " arguments; an op takes at most ", kMaxArgs);
  HD_CHECK_BUNDLE(!variants_.empty(), name_, ": no variants");
  for (const Variant& variant : variants_) {
    signatures_.push_back(variant.signature);
    HD_CHECK_BUNDLE(!variant.workspace_bytes || !workspace_.empty(), name_, ": variant ", variant.name, " asks for ",
                    variant.workspace_bytes, " bytes of a workspace without a name");
  }
  const std::array<int, kSymbols> binders = find_binders(args_);
  for (uint8_t i = 0; i < args_.size(); ++i) {
    const ArgSpec& arg = args_[i];
    HD_CHECK_BUNDLE(arg.values.size() < kUnlisted - 1, name_, ": ", arg.name, " lists ", arg.values.size(), " values");
    if (arg.is_tensor()) {
      add_tensor(i, binders);
    } else if (arg.kind == ArgKind::kFloat) {
      scalars_.push_back({i, arg.minimum});
    } else if (!arg.is_ignored) {
      if (arg.has_ladder) {
        HD_CHECK_BUNDLE(arg.kind == ArgKind::kInteger && arg.values.empty() && arg.least >= 1 && second_ < 0, name_,
                        ": ", arg.name, " has a ladder; one integer may, without values and of at least 1");
        second_ = i;
      }
      integers_.push_back(i);
      integer_bits_.set(i, 15);
    }
  }
  for (uint8_t symbol = 0; symbol < kSymbols; ++symbol) {
    has_[symbol] = binders[symbol] >= 0;
    const auto uses = [symbol](const Check& check) { return check.symbol == symbol; };
    const auto divides = [symbol](const Derived& derived) { return derived.symbol == symbol; };
    HD_CHECK_BUNDLE(binders[symbol] >= 0 || (std::none_of(checks_.begin(), checks_.end(), uses) &&
                                             std::none_of(derived_.begin(), derived_.end(), divides)),
                    name_, ": no tensor carries the size ", kSymbolNames[symbol], " plainly");
  }
  HD_CHECK_BUNDLE(binders[kM] >= 0 && !args_[static_cast<size_t>(binders[kM])].is_optional, name_,
                  ": no required tensor carries the size M plainly");
  first_ = static_cast<uint8_t>(binders[kM]);
  for (const Check& check : binders_)
    if (check.symbol == kM) first_dimension_ = check.dimension;
  std::stable_partition(reshapes_.begin(), reshapes_.end(), [this](const Reshape& item) { return item.arg == first_; });
  for (const TensorRule& rule : tensors_)
    if (!rule.is_mutated) read_.push_back(rule.arg);
}

void Op::add_tensor(uint8_t index, const std::array<int, kSymbols>& binders) {
  ArgSpec& arg = args_[index];
  if (arg.is_mutated) {
    mutated_.push_back(index);
    writes_without_rows_ |=
        std::none_of(arg.dims.begin(), arg.dims.end(), [](const Dim& dim) { return !dim.any && dim.symbol == kM; });
  }
  HD_CHECK_BUNDLE(!arg.dims.empty() && arg.dims.size() <= kMaxRank, name_, ": ", arg.name, " has rank ",
                  arg.dims.size(), "; it takes 1 to ", kMaxRank);
  HD_CHECK_BUNDLE(!arg.is_flat || arg.dims.size() == 1, name_, ": ", arg.name, " is flat and has rank ",
                  arg.dims.size());
  HD_CHECK_BUNDLE(!arg.is_merged || (!arg.is_flat && arg.dims.size() > 1), name_, ": ", arg.name,
                  " is merged and flat, or of rank 1");
  HD_CHECK_BUNDLE(arg.in_place_of < 0 || (arg.is_mutated && static_cast<size_t>(arg.in_place_of) < args_.size() &&
                                          args_[static_cast<size_t>(arg.in_place_of)].is_tensor()),
                  name_, ": ", arg.name, " is in place of no tensor, or is not written");
  HD_CHECK_BUNDLE(arg.layout != Layout::kColumns || arg.dims.size() == 2, name_, ": ", arg.name,
                  " is column-major and has rank ", arg.dims.size());
  TensorRule rule{index,
                  static_cast<uint8_t>(arg.dims.size()),
                  free_strides(arg),
                  0,
                  arg.is_mutated,
                  is_one_element(arg),
                  arg.layout == Layout::kColumns,
                  arg.is_broadcast,
                  {},
                  {}};
  if (arg.is_flat || arg.is_padded || arg.is_merged)
    reshapes_.push_back({index, rule.rank, arg.is_flat, arg.is_padded, arg.is_merged});
  bool bound[kSymbols] = {};
  for (uint8_t d = 0; d < arg.dims.size(); ++d) {
    Dim& dim = arg.dims[d];
    HD_CHECK_BUNDLE(dim.any || dim.factor > 0, name_, ": dimension ", int{d}, " of ", arg.name, " is ", dim.factor);
    rule.symbol[d] = kSymbols;
    rule.factor[d] = 1;
    if (dim.any) {
      rule.any_sizes |= static_cast<uint8_t>(1u << d);
      continue;
    }
    const bool plain = dim.divisor == 1 && dim.divisor_arg < 0;
    if (plain) {
      rule.symbol[d] = dim.symbol;
      rule.factor[d] = dim.factor;
    } else {
      rule.symbol[d] = derive(dim);
    }
    dim.binds = plain && dim.symbol < kSymbols && binders[dim.symbol] == index && !bound[dim.symbol];
    if (dim.binds) bound[dim.symbol] = true;
    (dim.binds ? binders_ : checks_).push_back({index, d, rule.symbol[d], rule.factor[d]});
  }
  tensors_.push_back(rule);
}

/// Index in Call::sizes of a quotient.
uint8_t Op::derive(const Dim& dim) {
  HD_CHECK_BUNDLE(dim.symbol < kSymbols && (dim.divisor_arg >= 0 || dim.divisor >= 1), name_, ": dimension ",
                  print_dim(dim, args_), " is no quotient of a size");
  size_t i = 0;
  while (i < derived_.size() && (derived_[i].symbol != dim.symbol || derived_[i].factor != dim.factor ||
                                 derived_[i].divisor != dim.divisor || derived_[i].divisor_arg != dim.divisor_arg))
    ++i;
  if (i == derived_.size()) derived_.push_back({dim.symbol, dim.factor, dim.divisor, dim.divisor_arg});
  HD_CHECK_BUNDLE(derived_.size() <= kMaxDerived, name_, ": more than ", kMaxDerived, " quotients of sizes");
  return static_cast<uint8_t>(kSymbols + 1 + i);
}

bool Op::reshape(Call& call) const noexcept {
  for (const Reshape& item : reshapes_) {
    const TensorView& view = call.tensors[item.arg];
    if (HD_LIKELY(view.dtype == DType::kNone || view.rank == item.rank)) continue;
    if (HD_UNLIKELY(reshape(item, call))) return false;
  }
  return true;
}

/// What keeps a tensor of another rank from becoming one of the declared rank; null if nothing does.
const char* Op::reshape(const Reshape& item, Call& call) const noexcept {
  TensorView& view = call.tensors[item.arg];
  if (item.is_flat) return flatten(view) ? nullptr : view.rank > kMaxRank ? "rank" : "strides";
  if (view.rank > item.rank && item.is_merged) {
    const TensorView& first = call.tensors[first_];
    const bool is_known = item.arg != first_ && first.dtype != DType::kNone && first.rank > first_dimension_;
    return merge(view, item.rank, is_known ? first.sizes[first_dimension_] : -1);
  }
  return item.is_padded && pad(view, item.rank) ? nullptr : "rank";
}

bool Op::bind_symbols(Call& call) const noexcept {
  call.sizes[kK] = call.sizes[kN] = 0;
  call.sizes[kSymbols] = 1;
  for (const Check& check : binders_) {
    const TensorView& view = call.tensors[check.arg];
    if (HD_UNLIKELY(view.dtype == DType::kNone)) {  // an optional one: its own symbols stay 0
      if (!args_[check.arg].is_optional) return false;
      continue;
    }
    if (HD_UNLIKELY(view.rank <= check.dimension)) return false;
    const int64_t size = view.sizes[check.dimension];
    if (HD_LIKELY(check.factor == 1)) {
      call.sizes[check.symbol] = size;
    } else {
      if (size % check.factor) return false;
      call.sizes[check.symbol] = size / check.factor;
    }
  }
  for (size_t i = 0; i < derived_.size(); ++i) {
    const Derived& item = derived_[i];
    const int64_t by = item.divisor_arg < 0 ? item.divisor : call.integers[item.divisor_arg];
    const int64_t whole = times(item.factor, call.sizes[item.symbol]);
    if (HD_UNLIKELY(by < 1)) return false;
    call.sizes[kSymbols + 1 + i] = whole / by + (whole % by != 0);
  }
  return true;
}

/// Sizes as declared; strides of a contiguous tensor, but for those that are free. Strides of dimensions of size <= 1,
/// which mean nothing, are made those of a contiguous tensor.
template <uint32_t kRank>
bool Op::accept(const TensorRule& rule, TensorView& view, const int64_t* sizes) noexcept {
  int64_t contiguous = 1;
  for (uint32_t i = kRank; i-- > 0;) {
    const uint32_t d = kRank == 2 && rule.is_columns ? 1 - i : i;
    const int64_t size = view.sizes[d];
    const int64_t wanted = times(rule.factor[d], sizes[rule.symbol[d]]);
    if (HD_UNLIKELY(size != wanted) && !(rule.any_sizes >> d & 1)) {
      if (!rule.is_broadcast || size != 1) return false;
      view.sizes[d] = wanted;
      view.strides[d] = view.sizes[d] > 1 ? 0 : 1;
    } else if (size <= 1) {  // of size 0: torch's strides go on as if it were 1
      view.strides[d] = contiguous;
    } else {
      // What is written does not overlap itself; where all strides are free bind_tensors sees to that.
      if (HD_UNLIKELY(view.strides[d] != contiguous) &&
          (!(rule.free_strides >> d & 1) ||
           (rule.is_mutated && view.strides[d] < (rule.free_strides == kAllStrides ? 1 : contiguous))))
        return false;
      contiguous = times(contiguous, size);
    }
  }
  return true;
}

bool Op::bind_tensors(Call& call, DeviceSlot slot, Signature& bound) const noexcept {
  Signature signature;  // not through the reference, which the views that are written might alias
  for (const TensorRule& rule : tensors_) {
    TensorView& view = call.tensors[rule.arg];
    if (view.dtype == DType::kNone) {
      view.storage = rule.arg + 1u;  // no other argument's
      continue;
    }
    signature.set(rule.arg, static_cast<uint64_t>(view.dtype));
    if (HD_UNLIKELY(view.slot != slot)) return false;
    if (HD_UNLIKELY(view.rank != rule.rank)) {
      if (view.rank != 0 || !rule.is_one_element) return false;
      view.rank = 1;
      view.sizes[0] = view.strides[0] = 1;
    }
    // Unrolled for the usual ranks: 20 ns less for five tensors.
    bool accepted = false;
    switch (rule.rank) {
      case 1:
        accepted = accept<1>(rule, view, call.sizes);
        break;
      case 2:
        accepted = accept<2>(rule, view, call.sizes);
        break;
      case 3:
        accepted = accept<3>(rule, view, call.sizes);
        break;
      default:
        accepted = accept<4>(rule, view, call.sizes);
    }
    if (HD_UNLIKELY(!accepted)) return false;
    if (HD_UNLIKELY(rule.is_mutated && rule.free_strides == kAllStrides) && may_overlap_itself(view)) return false;
  }
  bound = signature;
  return true;
}

bool Op::bind_scalars(const Call& call, Signature& signature) const noexcept {
  for (const ScalarRule& rule : scalars_)
    if (HD_UNLIKELY(!in_range(call.scalars[rule.arg], rule.minimum))) return false;
  for (const uint8_t i : integers_) {
    const ArgSpec& arg = args_[i];
    const int64_t value = call.integers[i];
    if (arg.kind == ArgKind::kNone) {
      signature.set(i, value ? kUnlisted : 0);
    } else if (!arg.values.empty()) {
      size_t at = 0;
      while (at < arg.values.size() && arg.values[at] != value) ++at;
      if (HD_UNLIKELY(at == arg.values.size() && value < arg.least)) return false;
      signature.set(i, at < arg.values.size() ? at + 1 : kUnlisted);
    } else if (HD_UNLIKELY(value < arg.least)) {
      return false;
    }
  }
  return true;
}

Bound Op::bind(Call& call, uint16_t& variant, DeviceSlot& slot) const noexcept {
  if (HD_UNLIKELY(!reshape(call) || !bind_symbols(call))) return Bound::kWrong;
  slot = call.tensors[first_].slot;
  Signature signature;
  if (HD_UNLIKELY(!bind_tensors(call, slot, signature))) return Bound::kWrong;
  if (HD_UNLIKELY(!bind_scalars(call, signature))) return Bound::kWrong;
  uint16_t found = 0;
  while (!(signatures_[found] == signature)) {
    if (HD_LIKELY(++found != signatures_.size())) continue;
    return is_unlisted(signature) ? Bound::kUnserved : Bound::kWrong;
  }
  variant = found;
  return HD_LIKELY(fits(call.sizes[kK], call.sizes[kN])) ? Bound::kYes : Bound::kWrong;
}

/// Whether a signature that no variant has would have one but for the values that are not listed.
bool Op::is_unlisted(const Signature& signature) const noexcept {
  const auto has_value = [&](uint8_t i) { return signature.get(i) == kUnlisted; };
  const auto has_dtypes = [&](const Signature& other) { return signature.same_but(integer_bits_, other); };
  return std::any_of(integers_.begin(), integers_.end(), has_value) &&
         std::any_of(signatures_.begin(), signatures_.end(), has_dtypes);
}

std::string Op::unserved(const Call& call) const {
  std::string out;
  for (const uint8_t i : integers_) {
    const ArgSpec& arg = args_[i];
    const bool listed = std::find(arg.values.begin(), arg.values.end(), call.integers[i]) != arg.values.end();
    if (arg.kind == ArgKind::kNone ? !call.integers[i] : arg.values.empty() || listed) continue;
    out += out.empty() ? "" : "; ";
    if (arg.kind == ArgKind::kNone) {
      out += arg.name + " is given, None is served";
      continue;
    }
    if (arg.kind == ArgKind::kString) {
      out += text(arg.name, " is ", Quoted{call.texts[i]}, ", served are");
      for (const std::string& value : arg.texts) out += text(" ", Quoted{{value.data(), value.size()}});
      continue;
    }
    out += text(arg.name, " is ", call.integers[i], ", served are");
    for (const int64_t value : arg.values) out += text(" ", value);
  }
  return out;
}

const std::string& Op::unserved_argument(const Call& call) const {
  for (const uint8_t i : integers_) {
    const ArgSpec& arg = args_[i];
    if (arg.kind == ArgKind::kNone ? call.integers[i] != 0
                                   : !arg.values.empty() && std::find(arg.values.begin(), arg.values.end(),
                                                                      call.integers[i]) == arg.values.end())
      return arg.name;
  }
  return name_;
}

HD_COLD bool Op::lacks_memory(const Call& call) const noexcept {
  return !memory_fault(call, [](const ArgSpec&, const char* kind, const auto&...) {
            return std::string(kind);
          }).empty();
}

/// `say(arg, kind, parts…)` makes what is returned; nothing for a call without such a fault.
template <typename Say>
std::string Op::memory_fault(const Call& call, const Say& say) const {
  const auto has_elements = [&call](uint8_t i) {
    const TensorView& view = call.tensors[i];
    return view.dtype != DType::kNone && view.rank <= kMaxRank && !is_empty(view);
  };
  for (const TensorRule& rule : tensors_)
    if (has_elements(rule.arg) && !call.tensors[rule.arg].storage)
      return say(args_[rule.arg], "storage", "has sizes ", Sizes{call.tensors[rule.arg]},
                 " and no memory: its storage was freed");
  for (const uint8_t i : mutated_)
    for (const TensorRule& rule : tensors_) {
      const uint8_t j = rule.arg;
      if (i == j || (rule.is_mutated && j < i) || !has_elements(j) || !has_elements(i)) continue;
      const TensorView &view = call.tensors[i], &other = call.tensors[j];
      if (HD_LIKELY(view.storage != other.storage)) continue;
      const bool in_place = args_[i].in_place_of == j || args_[j].in_place_of == i;
      if ((in_place && is_same_view(view, other)) || !overlap(view, other)) continue;
      return say(args_[i], "overlap", "is written and shares memory with ", args_[j].name,
                 "; call .clone() on one of them");
    }
  return {};
}

/// The first rule that a call breaks, as `say(arg, kind, parts…)` puts it.
template <typename Say>
std::string Op::first_fault(Call call, const Say& say) const {
  if (std::string found = memory_fault(call, say); !found.empty()) return found;
  for (const Reshape& item : reshapes_)  // the argument that gives M, which others are merged by
    if (item.arg == first_ && call.tensors[first_].dtype != DType::kNone && call.tensors[first_].rank != item.rank)
      reshape(item, call);
  DeviceSlot slot = kNoSlot;
  const ArgSpec* first = nullptr;
  for (const TensorRule& rule : tensors_) {
    TensorView& view = call.tensors[rule.arg];
    const ArgSpec& arg = args_[rule.arg];
    const Dims dims{arg, args_};
    if (view.dtype == DType::kNone) {
      if (!arg.is_optional) return say(arg, "None", "is None; it takes a tensor ", dims);
      continue;
    }
    if (std::find(arg.dtypes.begin(), arg.dtypes.end(), view.dtype) == arg.dtypes.end()) {
      std::string accepted;
      for (const DType dtype : arg.dtypes)
        accepted += (accepted.empty() ? "" : " or ") + std::string(hdispatch::name(dtype));
      return say(arg, "dtype", "has dtype ", hdispatch::name(view.dtype), "; it takes ", accepted);
    }
    if (view.rank == 0 && rule.is_one_element) {
      view.rank = 1;
      view.sizes[0] = view.strides[0] = 1;
    }
    if (view.rank != rule.rank) {
      const TensorView given = view;
      const auto item = std::find_if(reshapes_.begin(), reshapes_.end(),
                                     [&](const Reshape& reshape) { return reshape.arg == rule.arg; });
      const std::string_view what = item == reshapes_.end() ? "rank" : or_empty(reshape(*item, call));
      if (what == "rank" && arg.is_flat)
        return say(arg, "rank", "has rank ", given.rank, " (sizes ", Sizes{given}, "); it takes at most ", kMaxRank);
      if (what == "rank")
        return say(arg, "rank", "has rank ", given.rank, " (sizes ", Sizes{given}, "); it takes rank ", rule.rank, ", ",
                   dims);
      if (what == "size")
        return say(arg, "size", "with sizes ", Sizes{given}, " is not ", dims,
                   " with M = ", call.tensors[first_].sizes[first_dimension_]);
      if (what == "strides" && arg.is_flat)
        return say(arg, "strides", "with sizes ", Sizes{given}, " is not contiguous; it takes a contiguous tensor of ",
                   dims, " elements; call .contiguous() on it");
      if (what == "strides")
        return say(arg, "strides", "with sizes ", Sizes{given}, " has strides that cannot be merged to ", dims,
                   "; call .contiguous() on it");
    }
    if (!first) {
      first = &arg;
      slot = view.slot;
    } else if (view.slot != slot) {
      return say(arg, "device", "is on ", Slot{view.slot}, "; ", first->name, " is on ", Slot{slot},
                 "; all tensors are on one device");
    }
    if (std::string found = layout_fault(rule, view, say); !found.empty()) return found;
  }
  if (std::string found = size_fault(call, say); !found.empty()) return found;
  return variant_fault(call, say);
}

template <typename Say>
std::string Op::layout_fault(const TensorRule& rule, const TensorView& view, const Say& say) const {
  const ArgSpec& arg = args_[rule.arg];
  int64_t contiguous = 1;
  for (uint32_t i = view.rank; i-- > 0;) {
    const uint32_t d = rule.is_columns ? 1 - i : i;
    if (view.sizes[d] <= 1) continue;
    const bool is_free = rule.free_strides >> d & 1;
    if (view.strides[d] != contiguous && !is_free)
      return say(arg, "strides", "has stride(", d, ") = ", view.strides[d], " with sizes ", Sizes{view}, "; it takes ",
                 contiguous, " (", print_layout(arg.layout), "); call .contiguous() on it");
    const int64_t least = rule.free_strides == kAllStrides ? 1 : contiguous;
    if (view.strides[d] < least && rule.is_mutated)
      return say(arg, "strides", "has stride(", d, ") = ", view.strides[d], " with sizes ", Sizes{view},
                 "; it is written and takes at least ", least, "; call .contiguous() on it");
    contiguous = times(contiguous, view.sizes[d]);
  }
  if (rule.is_mutated && rule.free_strides == kAllStrides && may_overlap_itself(view))
    return say(arg, "strides", "with sizes ", Sizes{view}, " and stride(0) = ", view.strides[0],
               " may overlap itself; it is written: call .contiguous() on it");
  return {};
}

template <typename Say>
std::string Op::size_fault(Call& call, const Say& say) const {
  for (const uint8_t i : integers_) {
    const ArgSpec& arg = args_[i];
    const bool is_listed = std::find(arg.values.begin(), arg.values.end(), call.integers[i]) != arg.values.end();
    if (arg.kind != ArgKind::kNone && !is_listed && call.integers[i] < arg.least)
      return say(arg, "value", "is ", call.integers[i], "; it takes at least ", arg.least);
  }
  for (const Derived& item : derived_)
    if (item.divisor_arg >= 0 && call.integers[item.divisor_arg] < 1)
      return say(args_[static_cast<size_t>(item.divisor_arg)], "value", "is ", call.integers[item.divisor_arg],
                 "; it takes at least 1");
  for (const Check& check : binders_) {
    if (call.tensors[check.arg].dtype == DType::kNone) continue;
    const int64_t size = call.tensors[check.arg].sizes[check.dimension];
    if (size % check.factor)
      return say(args_[check.arg], "size", "has size(", int{check.dimension}, ") = ", size, "; it takes a multiple of ",
                 check.factor);
  }
  HD_CHECK(bind_symbols(call), name_, ": the sizes of a call that breaks no rule cannot be read");
  for (const Check& check : checks_) {
    const TensorView& view = call.tensors[check.arg];
    const ArgSpec& arg = args_[check.arg];
    if (view.dtype == DType::kNone) continue;
    const Dim& dim = arg.dims[check.dimension];
    const bool literal = dim.symbol == kSymbols;
    const int64_t wanted = times(check.factor, call.sizes[check.symbol]);
    if (view.sizes[check.dimension] != wanted && !(arg.is_broadcast && view.sizes[check.dimension] == 1))
      return say(arg, "size", "has size(", int{check.dimension}, ") = ", view.sizes[check.dimension], "; it takes ",
                 wanted, " (", Dims{arg, args_}, literal ? "" : " with ", literal ? "" : kSymbolNames[dim.symbol],
                 literal ? "" : " = ", literal ? "" : std::to_string(call.sizes[dim.symbol]), ")");
  }
  return {};
}

template <typename Say>
std::string Op::variant_fault(const Call& call, const Say& say) const {
  for (const ScalarRule& rule : scalars_)
    if (!in_range(call.scalars[rule.arg], rule.minimum))
      return say(args_[rule.arg], "value", "is ", call.scalars[rule.arg], "; it takes a finite float32",
                 std::isinf(rule.minimum) ? "" : text(" of at least ", rule.minimum));
  Signature signature;
  for (const TensorRule& rule : tensors_) signature.set(rule.arg, static_cast<uint64_t>(call.tensors[rule.arg].dtype));
  bind_scalars(call, signature);
  if (std::find(signatures_.begin(), signatures_.end(), signature) == signatures_.end()) {
    std::string got;
    for (const TensorRule& rule : tensors_)
      got += (got.empty() ? "" : ", ") + args_[rule.arg].name + " " +
             std::string(hdispatch::name(call.tensors[rule.arg].dtype));
    std::string variants;
    for (const Variant& variant : variants_) variants += (variants.empty() ? "" : ", ") + variant.name;
    return say.call(odd_one(signature), "dtype", "no variant takes this combination of dtypes (", got,
                    "); variants are ", variants);
  }
  if (!fits(call.sizes[kK], call.sizes[kN]))
    return say.call(args_[first_], "size", "K = ", call.sizes[kK], ", N = ", call.sizes[kN], "; sizes are below 2^32");
  return {};
}

/// The tensor that differs from the variant that has most of a call's dtypes.
const ArgSpec& Op::odd_one(const Signature& signature) const {
  const auto has = [&](const Signature& other, uint8_t arg) { return signature.get(arg) == other.get(arg); };
  const ArgSpec* odd = &args_[first_];
  size_t most = 0;
  for (const Signature& other : signatures_) {
    size_t same = 1;
    const ArgSpec* differs = nullptr;
    for (const TensorRule& rule : tensors_) {
      if (has(other, rule.arg))
        ++same;
      else if (!differs)
        differs = &args_[rule.arg];
    }
    if (!differs || same <= most) continue;
    most = same;
    odd = differs;
  }
  return *odd;
}

void Op::complain(const Call& call) const {
  const std::string found = first_fault(call, Words{name_});
  HD_CHECK(!found.empty(), name_, ": bind refused a call that breaks no rule");
  throw Error(Fault::kCaller, found);
}

std::string Op::reason(const Call& call) const { return first_fault(call, Reason{}); }

namespace {
template <typename Items, typename Accept>
int index_of(const Items& items, std::string_view name, Accept accept) {
  for (size_t i = 0; i < items.size(); ++i)
    if (items[i].name == name && accept(items[i])) return static_cast<int>(i);
  return -1;
}
}  // namespace

int Op::find_tensor(std::string_view name) const noexcept {
  return index_of(args_, name, [](const ArgSpec& arg) { return arg.is_tensor(); });
}
int Op::find_memory(std::string_view name) const noexcept {
  return workspace() >= 0 && name == workspace_ ? workspace() : find_tensor(name);
}
int Op::find_float(std::string_view name) const noexcept {
  return index_of(args_, name, [](const ArgSpec& arg) { return arg.kind == ArgKind::kFloat; });
}
int Op::find_integer(std::string_view name) const noexcept {
  return index_of(args_, name,
                  [](const ArgSpec& arg) { return arg.kind == ArgKind::kInteger || arg.kind == ArgKind::kBool; });
}
int Op::find_variant(std::string_view name) const noexcept {
  return index_of(variants_, name, [](const Variant&) { return true; });
}

}  // namespace hdispatch
