// op_faults.cpp -- the fault of a call, as a message for its caller and as a reason to count by.
//
// Off the hot path: `bind` has refused the call already. The first fault in the order of the arguments is reported, so
// that one mistake always has one message, however many rules it breaks.
#include <algorithm>
#include <cmath>

#include "check.h"
#include "op_rules.h"
#include "overlap.h"

namespace hdispatch {

std::string print_dim(const Dim& dim, const std::vector<ArgSpec>& args) {
  if (dim.any) return "*";
  std::string out = dim.symbol == kSymbols
                        ? std::to_string(dim.factor)
                        : (dim.factor == 1 ? "" : std::to_string(dim.factor) + "*") + kSymbolNames[dim.symbol];
  if (dim.divisor_arg >= 0) return out + "/" + args[static_cast<size_t>(dim.divisor_arg)].name;
  return dim.divisor == 1 ? out : out + "/" + std::to_string(dim.divisor);
}

namespace {

// What messages print, put into words only when they are wanted.
/// Views into the call: they do not outlive the `say` that they are given to.
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

// One walk over the rules makes both texts: `Words` for the caller, `Reason` to count by. Two walks would drift apart.

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

}  // namespace

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
      // Of two that are both written the first is named.
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
  // On a copy of the call: views are reshaped on the way.
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
    // Before their combination, which variant_fault looks at: a dtype that no variant has there is this one's fault.
    if (std::find(arg.dtypes.begin(), arg.dtypes.end(), view.dtype) == arg.dtypes.end()) {
      std::string accepted;
      for (const DType dtype : arg.dtypes)
        accepted += (accepted.empty() ? "" : " or ") + std::string(hdispatch::name(dtype));
      return say(arg, "dtype", "has dtype ", hdispatch::name(view.dtype), "; it takes ", accepted);
    }
    // As `bind_tensors` does: what it lets pass is no fault.
    if (view.rank == 0 && rule.is_one_element) {
      view.rank = 1;
      view.sizes[0] = view.strides[0] = 1;
    }
    if (view.rank != rule.rank) {
      // Kept, because a reshape that fails may have changed the view: the message has the sizes that were given.
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
  // What it refuses has been reported above; from here on messages may name the sizes.
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
  // It cannot fail: floats are tested above, integers in size_fault.
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
    // The first variant of those that are equally near: one call always gets one answer.
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

}  // namespace hdispatch
