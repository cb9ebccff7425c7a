// op.cpp -- checking a call against an op's declaration.
#include "op.h"

#include <algorithm>
#include <cmath>

#include "check.h"

namespace hdispatch {

ForkMutex OpCounters::mutex;
namespace {

constexpr const char* kSymbolNames[] = {"M", "K", "N"};
constexpr uint64_t kUnlisted = 15;  ///< nibble of a value that is not compiled in; no variant has it

std::string print_dim(const Dim& dim, const std::vector<ArgSpec>& args) {
  if (dim.any) return "*";
  std::string out = dim.symbol == kSymbols
                        ? std::to_string(dim.factor)
                        : (dim.factor == 1 ? "" : std::to_string(dim.factor) + "*") + kSymbolNames[dim.symbol];
  if (dim.divisor_arg >= 0) return out + "/" + args[static_cast<size_t>(dim.divisor_arg)].name;
  return dim.divisor == 1 ? out : out + "/" + std::to_string(dim.divisor);
}

std::string print_dims(const ArgSpec& arg, const std::vector<ArgSpec>& args) {
  std::string out = "[";
  for (const Dim& dim : arg.dims) out += (out.size() > 1 ? ", " : "") + print_dim(dim, args);
  return out + "]";
}

std::string print_sizes(const TensorView& view) {
  std::string out = "[";
  for (uint32_t i = 0; i < std::min(view.rank, kMaxRank); ++i) out += (i ? ", " : "") + std::to_string(view.sizes[i]);
  return out + (view.rank > kMaxRank ? ", ...]" : "]");
}

std::string print_slot(DeviceSlot slot) {
  if (slot == kCpuSlot) return "cpu";
  return slot == kNoSlot ? "another device" : "cuda:" + std::to_string(slot - 1);
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
      return 15;
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

Op::Op(uint16_t id, std::string name, std::string schema, std::vector<ArgSpec> args, std::vector<Variant> variants)
    : id_(id),
      name_(std::move(name)),
      schema_(std::move(schema)),
      args_(std::move(args)),
      variants_(std::move(variants)) {
  HD_CHECK_BUNDLE(args_.size() <= kMaxArgs, name_, ": ", args_.size(), " arguments; an op takes at most ", kMaxArgs);
  HD_CHECK_BUNDLE(!variants_.empty(), name_, ": no variants");
  for (const Variant& variant : variants_) signatures_.push_back(variant.signature);
  const std::array<int, kSymbols> binders = find_binders(args_);
  for (uint8_t i = 0; i < args_.size(); ++i) {
    const ArgSpec& arg = args_[i];
    HD_CHECK_BUNDLE(arg.values.size() < kUnlisted - 1, name_, ": ", arg.name, " lists ", arg.values.size(), " values");
    if (arg.is_tensor()) {
      add_tensor(i, binders);
    } else if (arg.kind == ArgKind::kFloat) {
      scalars_.push_back({i, arg.minimum});
    } else {
      integers_.push_back(i);
      integer_bits_ |= uint64_t{15} << (4 * i);
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
}

void Op::add_tensor(uint8_t index, const std::array<int, kSymbols>& binders) {
  ArgSpec& arg = args_[index];
  if (arg.is_mutated) mutated_.push_back(index);
  HD_CHECK_BUNDLE(!arg.dims.empty() && arg.dims.size() <= kMaxRank, name_, ": ", arg.name, " has rank ",
                  arg.dims.size(), "; it takes 1 to ", kMaxRank);
  HD_CHECK_BUNDLE(!arg.is_flat || arg.dims.size() == 1, name_, ": ", arg.name, " is flat and has rank ",
                  arg.dims.size());
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
  if (arg.is_flat || arg.is_padded) reshapes_.push_back({index, rule.rank, arg.is_flat});
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
    TensorView& view = call.tensors[item.arg];
    if (view.dtype == DType::kNone) continue;
    if (HD_LIKELY(view.rank == item.rank)) continue;
    if (HD_UNLIKELY(!(item.is_flat ? flatten(view) : pad(view, item.rank)))) return false;
  }
  return true;
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
      // What is written does not overlap itself; with all strides free that is the caller's to see to.
      if (HD_UNLIKELY(view.strides[d] != contiguous) &&
          (!(rule.free_strides >> d & 1) ||
           (rule.is_mutated && view.strides[d] < (rule.free_strides == 15 ? 1 : contiguous))))
        return false;
      contiguous = times(contiguous, size);
    }
  }
  return true;
}

bool Op::bind_tensors(Call& call, DeviceSlot slot, uint64_t& signature) const noexcept {
  for (const TensorRule& rule : tensors_) {
    TensorView& view = call.tensors[rule.arg];
    if (view.dtype == DType::kNone) continue;
    signature |= static_cast<uint64_t>(view.dtype) << (4 * rule.arg);
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
  }
  return true;
}

bool Op::bind_scalars(const Call& call, uint64_t& signature) const noexcept {
  for (const ScalarRule& rule : scalars_)
    if (HD_UNLIKELY(!in_range(call.scalars[rule.arg], rule.minimum))) return false;
  for (const uint8_t i : integers_) {
    const ArgSpec& arg = args_[i];
    const int64_t value = call.integers[i];
    if (arg.kind == ArgKind::kNone) {
      signature |= (value ? kUnlisted : 0) << (4 * i);
    } else if (!arg.values.empty()) {
      size_t at = 0;
      while (at < arg.values.size() && arg.values[at] != value) ++at;
      signature |= (at < arg.values.size() ? at + 1 : kUnlisted) << (4 * i);
    } else if (HD_UNLIKELY(value < arg.least)) {
      return false;
    }
  }
  return true;
}

Bound Op::bind(Call& call, uint16_t& variant, DeviceSlot& slot) const noexcept {
  if (HD_UNLIKELY(!reshape(call) || !bind_symbols(call))) return Bound::kWrong;
  slot = call.tensors[first_].slot;
  uint64_t signature = 0;
  if (HD_UNLIKELY(!bind_tensors(call, slot, signature))) return Bound::kWrong;
  if (HD_UNLIKELY(!bind_scalars(call, signature))) return Bound::kWrong;
  uint16_t found = 0;
  while (signatures_[found] != signature) {
    if (HD_LIKELY(++found != signatures_.size())) continue;
    return is_unlisted(signature) ? Bound::kUnserved : Bound::kWrong;
  }
  variant = found;
  return HD_LIKELY(fits(call.sizes[kK], call.sizes[kN])) ? Bound::kYes : Bound::kWrong;
}

/// Whether a signature that no variant has would have one but for the values that are not listed.
bool Op::is_unlisted(uint64_t signature) const noexcept {
  const auto has_value = [&](uint8_t i) { return (signature >> 4 * i & 15) == kUnlisted; };
  const auto has_dtypes = [&](uint64_t other) { return ((signature ^ other) & ~integer_bits_) == 0; };
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
    out += text(arg.name, " is ", call.integers[i], ", served are");
    for (const int64_t value : arg.values) out += text(" ", value);
  }
  return out;
}

void Op::complain(const Call& given) const {
  Call call = given;
  const auto refuse = [this](const ArgSpec& arg, auto&&... parts) {
    fail(Fault::kCaller, name_, ": ", arg.name, " ", parts...);
  };
  DeviceSlot slot = kNoSlot;
  const ArgSpec* first = nullptr;
  for (const TensorRule& rule : tensors_) {
    TensorView& view = call.tensors[rule.arg];
    const ArgSpec& arg = args_[rule.arg];
    if (view.dtype == DType::kNone) {
      if (!arg.is_optional) refuse(arg, "is None; it takes a tensor ", print_dims(arg, args_));
      continue;
    }
    std::string accepted;
    bool ok = false;
    for (const DType dtype : arg.dtypes) {
      accepted += (accepted.empty() ? "" : " or ") + std::string(hdispatch::name(dtype));
      ok = ok || dtype == view.dtype;
    }
    if (!ok) refuse(arg, "has dtype ", hdispatch::name(view.dtype), "; it takes ", accepted);
    if (view.rank == 0 && rule.is_one_element) {
      view.rank = 1;
      view.sizes[0] = view.strides[0] = 1;
    }
    if (arg.is_flat && view.rank > kMaxRank)
      refuse(arg, "has rank ", view.rank, " (sizes ", print_sizes(view), "); it takes at most ", kMaxRank);
    if (arg.is_flat && view.rank != 1 && !flatten(view))
      refuse(arg, "with sizes ", print_sizes(view), " is not contiguous; it takes a contiguous tensor of ",
             print_dims(arg, args_), " elements; call .contiguous() on it");
    if (arg.is_padded) pad(view, rule.rank);
    if (view.rank != arg.dims.size())
      refuse(arg, "has rank ", view.rank, " (sizes ", print_sizes(view), "); it takes rank ", arg.dims.size(), ", ",
             print_dims(arg, args_));
    if (!first) {
      first = &arg;
      slot = view.slot;
    } else if (view.slot != slot) {
      refuse(arg, "is on ", print_slot(view.slot), "; ", first->name, " is on ", print_slot(slot),
             "; all tensors are on one device");
    }
    int64_t contiguous = 1;
    for (uint32_t i = view.rank; i-- > 0;) {
      const uint32_t d = rule.is_columns ? 1 - i : i;
      if (view.sizes[d] <= 1) continue;
      const bool is_free = rule.free_strides >> d & 1;
      if (view.strides[d] != contiguous && !is_free)
        refuse(arg, "has stride(", d, ") = ", view.strides[d], " with sizes ", print_sizes(view), "; it takes ",
               contiguous, " (", print_layout(arg.layout), "); call .contiguous() on it");
      const int64_t least = rule.free_strides == 15 ? 1 : contiguous;
      if (view.strides[d] < least && rule.is_mutated)
        refuse(arg, "has stride(", d, ") = ", view.strides[d], " with sizes ", print_sizes(view),
               "; it is written and takes at least ", least, "; call .contiguous() on it");
      contiguous = times(contiguous, view.sizes[d]);
    }
  }
  for (const uint8_t i : integers_)
    if (args_[i].kind != ArgKind::kNone && args_[i].values.empty() && call.integers[i] < args_[i].least)
      refuse(args_[i], "is ", call.integers[i], "; it takes at least ", args_[i].least);
  for (const Derived& item : derived_)
    if (item.divisor_arg >= 0 && call.integers[item.divisor_arg] < 1)
      refuse(args_[static_cast<size_t>(item.divisor_arg)], "is ", call.integers[item.divisor_arg],
             "; it takes at least 1");
  for (const Check& check : binders_) {
    if (call.tensors[check.arg].dtype == DType::kNone) continue;
    const int64_t size = call.tensors[check.arg].sizes[check.dimension];
    if (size % check.factor)
      refuse(args_[check.arg], "has size(", int{check.dimension}, ") = ", size, "; it takes a multiple of ",
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
      refuse(arg, "has size(", int{check.dimension}, ") = ", view.sizes[check.dimension], "; it takes ", wanted, " (",
             print_dims(arg, args_), literal ? "" : " with ", literal ? "" : kSymbolNames[dim.symbol],
             literal ? "" : " = ", literal ? "" : std::to_string(call.sizes[dim.symbol]), ")");
  }
  for (const ScalarRule& rule : scalars_)
    if (!in_range(call.scalars[rule.arg], rule.minimum))
      refuse(args_[rule.arg], "is ", call.scalars[rule.arg], "; it takes a finite float32",
             std::isinf(rule.minimum) ? "" : text(" of at least ", rule.minimum));
  uint64_t signature = 0;
  for (const TensorRule& rule : tensors_)
    signature |= static_cast<uint64_t>(call.tensors[rule.arg].dtype) << (4 * rule.arg);
  bind_scalars(call, signature);
  if (std::find(signatures_.begin(), signatures_.end(), signature) == signatures_.end()) {
    std::string got;
    for (const TensorRule& rule : tensors_)
      got += (got.empty() ? "" : ", ") + args_[rule.arg].name + " " +
             std::string(hdispatch::name(call.tensors[rule.arg].dtype));
    std::string variants;
    for (const Variant& variant : variants_) variants += (variants.empty() ? "" : ", ") + variant.name;
    fail(Fault::kCaller, name_, ": no variant takes this combination of dtypes (", got, "); variants are ", variants);
  }
  if (!fits(call.sizes[kK], call.sizes[kN]))
    fail(Fault::kCaller, name_, ": K = ", call.sizes[kK], ", N = ", call.sizes[kN], "; sizes are below 2^32");
  HD_CHECK(false, name_, ": bind refused a call that breaks no rule");
}

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
