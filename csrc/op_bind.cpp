// op_bind.cpp -- the hot path of an op: one call checked, its sizes and its variant found, no message built.
//
// Four passes over packed rules: other ranks become the declared one, the symbols get their values, every tensor is
// compared with them, every scalar is looked up. The dtypes and the values that are compiled in fill a signature on the
// way; the variant is the one with that signature. What a pass refuses is put into words by op_faults.cpp, which walks
// the same rules again: nothing here pays for a message.
#include <algorithm>

#include "op_rules.h"
#include "overlap.h"
#include "reshape.h"

namespace hdispatch {

/// Before everything else: M may come from a tensor that has another rank. `reshapes_` begins with that one, because
/// the others are merged by its M.
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

/// Before the tensors are compared: an argument may come before the one that gives its symbol a value.
bool Op::bind_symbols(Call& call) const noexcept {
  call.sizes[kK] = call.sizes[kN] = call.sizes[kA] = call.sizes[kB] = 0;
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
    if (HD_UNLIKELY(by < 1)) return false;  // the caller's integer; `whole / 0` would end the process
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

/// Integers after floats: only integers can make a call unserved, and a float that breaks its rule is the caller's
/// fault whatever they are.
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
      // At least its minimum and not listed: nothing is wrong with it, there is no code for it. A miss, not an error.
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
  // Linear: ops have few variants and servers call one of the first; a hash would cost more than the walk.
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

}  // namespace hdispatch
