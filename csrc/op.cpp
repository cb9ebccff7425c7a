// op.cpp -- checking a call against an op's declaration.
#include "op.h"

#include <algorithm>
#include <cmath>

#include "check.h"

namespace hdispatch {
namespace {

constexpr const char* kSymbolNames[] = {"M", "K", "N"};

std::string print_dim(const Dim& dim) {
  if (dim.symbol == kSymbols) return std::to_string(dim.factor);
  return (dim.factor == 1 ? "" : std::to_string(dim.factor) + "*") + kSymbolNames[dim.symbol];
}

std::string print_dims(const std::vector<Dim>& dims) {
  std::string out = "[";
  for (const Dim& dim : dims) out += (out.size() > 1 ? ", " : "") + print_dim(dim);
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

constexpr double kMaxFloat32 = 3.4028234663852886e38;

/// Only the first dimension's stride may differ from a contiguous tensor's, and rows that are written do not overlap.
template <typename Rule>
bool is_free(const Rule& rule, const TensorView& view, uint32_t dimension, int64_t contiguous) {
  return dimension == 0 && rule.is_row_strided && view.rank > 1 && (!rule.is_mutated || view.strides[0] >= contiguous);
}

/// Wraps: sizes with a product beyond int64 are those of a tensor without elements.
int64_t times(int64_t a, int64_t b) {
  return static_cast<int64_t>(static_cast<uint64_t>(a) * static_cast<uint64_t>(b));
}

/// False for NaN too.
bool in_range(double value, double minimum) { return value >= minimum && std::abs(value) <= kMaxFloat32; }

/// A one-element argument may have rank 0, as torch makes them.
bool is_one_element(const std::vector<Dim>& dims) {
  return dims.size() == 1 && dims[0].symbol == kSymbols && dims[0].factor == 1;
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
  bool bound[kSymbols] = {};
  for (uint8_t i = 0; i < args_.size(); ++i) {
    ArgSpec& arg = args_[i];
    if (!arg.is_tensor) {
      scalars_.push_back({i, arg.minimum});
      continue;
    }
    if (arg.is_mutated) mutated_.push_back(i);
    HD_CHECK_BUNDLE(!arg.dims.empty() && arg.dims.size() <= kMaxRank, name_, ": ", arg.name, " has rank ",
                    arg.dims.size(), "; it takes 1 to ", kMaxRank);
    TensorRule rule{
        i, static_cast<uint8_t>(arg.dims.size()), arg.is_row_strided, arg.is_mutated, is_one_element(arg.dims), {}, {}};
    for (uint8_t d = 0; d < arg.dims.size(); ++d) {
      Dim& dim = arg.dims[d];
      HD_CHECK_BUNDLE(dim.factor > 0, name_, ": dimension ", int{d}, " of ", arg.name, " is ", dim.factor);
      dim.binds = dim.symbol != kSymbols && !arg.is_mutated && !arg.is_optional && !bound[dim.symbol];
      if (dim.binds) bound[dim.symbol] = true;
      (dim.binds ? binders_ : checks_).push_back({i, d, dim.symbol, dim.factor});
      rule.symbol[d] = dim.symbol;
      rule.factor[d] = dim.factor;
    }
    tensors_.push_back(rule);
  }
  for (const Check& check : checks_)
    HD_CHECK_BUNDLE(check.symbol == kSymbols || bound[check.symbol], name_, ": no required input carries the size ",
                    kSymbolNames[check.symbol]);
  HD_CHECK_BUNDLE(bound[kM], name_, ": no required input carries the size M");
}

bool Op::bind_symbols(Call& call) const noexcept {
  call.sizes[kK] = call.sizes[kN] = 0;
  call.sizes[kSymbols] = 1;
  for (const Check& check : binders_) {
    const TensorView& view = call.tensors[check.arg];
    if (HD_UNLIKELY(view.dtype == DType::kNone || view.rank <= check.dimension)) return false;
    const int64_t size = view.sizes[check.dimension];
    if (HD_LIKELY(check.factor == 1)) {
      call.sizes[check.symbol] = size;
    } else {
      if (size % check.factor) return false;
      call.sizes[check.symbol] = size / check.factor;
    }
  }
  return true;
}

/// Sizes as declared; strides of a contiguous tensor, but for a free first dimension. Strides of dimensions of size <=
/// 1, which mean nothing, are made those of a contiguous tensor.
template <uint32_t kRank>
bool Op::accept(const TensorRule& rule, TensorView& view, const int64_t* sizes) noexcept {
  int64_t contiguous = 1;
  for (uint32_t d = kRank; d-- > 0;) {
    const int64_t size = view.sizes[d];
    if (HD_UNLIKELY(size != times(rule.factor[d], sizes[rule.symbol[d]]))) return false;
    if (size <= 1) {  // of size 0: torch's strides go on as if it were 1
      view.strides[d] = contiguous;
    } else {
      if (HD_UNLIKELY(view.strides[d] != contiguous) && !is_free(rule, view, d, contiguous)) return false;
      contiguous = times(contiguous, size);
    }
  }
  return true;
}

bool Op::bind(Call& call, uint16_t& variant, DeviceSlot& slot) const noexcept {
  // 1. M, K, N
  if (HD_UNLIKELY(!bind_symbols(call))) return false;
  slot = call.tensors[binders_[0].arg].slot;
  // 2. rank, device, sizes, strides; dtypes and absent arguments -> signature
  uint64_t signature = 0;
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
  // 3. signature -> variant
  uint16_t found = 0;
  while (signatures_[found] != signature)
    if (HD_UNLIKELY(++found == signatures_.size())) return false;
  variant = found;
  // 4. scalars
  for (const ScalarRule& rule : scalars_)
    if (HD_UNLIKELY(!in_range(call.scalars[rule.arg], rule.minimum))) return false;
  return HD_LIKELY(fits(call.sizes[kK], call.sizes[kN]));
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
      if (!arg.is_optional) refuse(arg, "is None; it takes a tensor ", print_dims(arg.dims));
      continue;
    }
    std::string accepted;
    bool ok = false;
    for (const DType dtype : arg.dtypes) {
      accepted += (accepted.empty() ? "" : " or ") + std::string(hdispatch::name(dtype));
      ok = ok || dtype == view.dtype;
    }
    if (!ok) refuse(arg, "has dtype ", hdispatch::name(view.dtype), "; it takes ", accepted);
    if (view.rank == 0 && is_one_element(arg.dims)) {
      view.rank = 1;
      view.sizes[0] = view.strides[0] = 1;
    }
    if (view.rank != arg.dims.size())
      refuse(arg, "has rank ", view.rank, " (sizes ", print_sizes(view), "); it takes rank ", arg.dims.size(), ", ",
             print_dims(arg.dims));
    if (!first) {
      first = &arg;
      slot = view.slot;
    } else if (view.slot != slot) {
      refuse(arg, "is on ", print_slot(view.slot), "; ", first->name, " is on ", print_slot(slot),
             "; all tensors are on one device");
    }
    int64_t contiguous = 1;
    for (uint32_t d = view.rank; d-- > 0;) {
      if (view.sizes[d] <= 1) continue;
      if (view.strides[d] != contiguous && !is_free(arg, view, d, contiguous))
        refuse(arg, "has stride(", d, ") = ", view.strides[d], " with sizes ", print_sizes(view), "; it takes ",
               contiguous, arg.is_row_strided ? " (only stride(0) is free)" : " (contiguous)",
               "; call .contiguous() on it");
      contiguous = times(contiguous, view.sizes[d]);
    }
  }
  uint64_t signature = 0;
  for (const TensorRule& rule : tensors_)
    signature |= static_cast<uint64_t>(call.tensors[rule.arg].dtype) << (4 * rule.arg);
  bool known = false;
  for (const Variant& variant : variants_) known = known || variant.signature == signature;
  if (!known) {
    std::string got;
    for (const TensorRule& rule : tensors_)
      got += (got.empty() ? "" : ", ") + args_[rule.arg].name + " " +
             std::string(hdispatch::name(call.tensors[rule.arg].dtype));
    std::string variants;
    for (const Variant& variant : variants_) variants += (variants.empty() ? "" : ", ") + variant.name;
    fail(Fault::kCaller, name_, ": no variant takes this combination of dtypes (", got, "); variants are ", variants);
  }
  for (const Check& check : binders_) {
    const int64_t size = call.tensors[check.arg].sizes[check.dimension];
    if (size % check.factor)
      refuse(args_[check.arg], "has size(", int{check.dimension}, ") = ", size, "; it takes a multiple of ",
             check.factor);
  }
  bind_symbols(call);
  for (const Check& check : checks_) {
    const TensorView& view = call.tensors[check.arg];
    if (view.dtype == DType::kNone) continue;
    const bool literal = check.symbol == kSymbols;
    const int64_t wanted = literal ? check.factor : times(check.factor, call.sizes[check.symbol]);
    if (view.sizes[check.dimension] != wanted)
      refuse(args_[check.arg], "has size(", int{check.dimension}, ") = ", view.sizes[check.dimension], "; it takes ",
             wanted, " (", print_dims(args_[check.arg].dims), literal ? "" : " with ",
             literal ? "" : kSymbolNames[check.symbol], literal ? "" : " = ",
             literal ? "" : std::to_string(call.sizes[check.symbol]), ")");
  }
  for (const ScalarRule& rule : scalars_)
    if (!in_range(call.scalars[rule.arg], rule.minimum))
      refuse(args_[rule.arg], "is ", call.scalars[rule.arg], "; it takes a finite float32",
             std::isinf(rule.minimum) ? "" : text(" of at least ", rule.minimum));
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
  return index_of(args_, name, [](const ArgSpec& arg) { return arg.is_tensor; });
}
int Op::find_scalar(std::string_view name) const noexcept {
  return index_of(args_, name, [](const ArgSpec& arg) { return !arg.is_tensor; });
}
int Op::find_variant(std::string_view name) const noexcept {
  return index_of(variants_, name, [](const Variant&) { return true; });
}

}  // namespace hdispatch
