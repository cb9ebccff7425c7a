// op.cpp -- an op's declaration: refused if it cannot be dispatched, else packed into the rules that `bind` reads.
//
// Whatever `bind` takes for granted is checked here, once: it would be paid for with every call there, and where it did
// not hold a call would read past an array, divide by zero or launch a kernel on the wrong sizes.
#include "op.h"

#include <algorithm>

#include "check.h"
#include "op_rules.h"

namespace hdispatch {

ForkMutex OpCounters::mutex;
namespace {

/// A one-element argument may have rank 0, as torch makes them.
bool is_one_element(const ArgSpec& arg) {
  return arg.dims.size() == 1 && arg.dims[0].symbol == kSymbols && !arg.dims[0].any && arg.dims[0].factor == 1;
}

/// Bit d: dimension d's. A tensor of rank 1 has no rows to be apart: its only stride is that of the elements.
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

/// Which tensor gives each symbol its value: a required one that is only read, else a required one, else an optional
/// one. Inputs come before outputs, so that where the two disagree the message is about the output.
/// A broadcast tensor may have size 1 where the symbol has another value, and a quotient has that of several: neither
/// gives one.
std::array<int, kSymbols> find_binders(const std::vector<ArgSpec>& args) {
  std::array<int, kSymbols> found;
  found.fill(-1);
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
  // A Call and a Signature have room for no more; what fills them does not ask.
  HD_CHECK_BUNDLE(args_.size() <= kMaxArgs, name_, ": ", args_.size(), " arguments; an op takes at most ", kMaxArgs);
  HD_CHECK_BUNDLE(!variants_.empty(), name_, ": no variants");
  for (const Variant& variant : variants_) {
    signatures_.push_back(variant.signature);
    // A record asks for memory by name: nothing could reach a block without one.
    HD_CHECK_BUNDLE(!variant.workspace_bytes || !workspace_.empty(), name_, ": variant ", variant.name, " asks for ",
                    variant.workspace_bytes, " bytes of a workspace without a name");
  }
  // Everything that `bind` reads is packed here, once: walking ArgSpec, strings and all, would cost it twice the time.
  const std::array<int, kSymbols> binders = find_binders(args_);
  for (uint8_t i = 0; i < args_.size(); ++i) {
    const ArgSpec& arg = args_[i];
    // 1 + a value's position is a nibble of the signature; 15 says that it is not listed.
    HD_CHECK_BUNDLE(arg.values.size() < kUnlisted - 1, name_, ": ", arg.name, " lists ", arg.values.size(), " values");
    if (arg.is_tensor()) {
      add_tensor(i, binders);
    } else if (arg.kind == ArgKind::kFloat) {
      scalars_.push_back({i, arg.minimum});
    } else if (!arg.is_ignored) {  // else in no signature: its value picks nothing
      if (arg.has_ladder) {
        // The key has one field for buckets, which M and one integer share. A ladder begins at 1.
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
    // Nothing would set it: calls would be compared with 0, or of M with what was on the stack.
    HD_CHECK_BUNDLE(binders[symbol] >= 0 || (std::none_of(checks_.begin(), checks_.end(), uses) &&
                                             std::none_of(derived_.begin(), derived_.end(), divides)),
                    name_, ": no tensor carries the size ", kSymbolNames[symbol], " plainly");
  }
  // `bind` reads the device from this tensor, and the key's bucket from M: it is in every call.
  HD_CHECK_BUNDLE(binders[kM] >= 0 && !args_[static_cast<size_t>(binders[kM])].is_optional, name_,
                  ": no required tensor carries the size M plainly");
  first_ = static_cast<uint8_t>(binders[kM]);
  for (const Check& check : binders_)
    if (check.symbol == kM) first_dimension_ = check.dimension;
  // The argument that gives M takes its declared rank first: others are merged by that M.
  std::stable_partition(reshapes_.begin(), reshapes_.end(), [this](const Reshape& item) { return item.arg == first_; });
  // Two that are only read may share memory: `has_memory` compares them with what is written alone.
  for (const TensorRule& rule : tensors_)
    if (!rule.is_mutated) read_.push_back(rule.arg);
}

void Op::add_tensor(uint8_t index, const std::array<int, kSymbols>& binders) {
  ArgSpec& arg = args_[index];
  if (arg.is_mutated) {
    mutated_.push_back(index);
    // Without rows no kernel runs, but this output is to be written all the same: by the fallback.
    writes_without_rows_ |=
        std::none_of(arg.dims.begin(), arg.dims.end(), [](const Dim& dim) { return !dim.any && dim.symbol == kM; });
  }
  // A TensorView has room for no more, and `accept` is unrolled for 1 to 4.
  HD_CHECK_BUNDLE(!arg.dims.empty() && arg.dims.size() <= kMaxRank, name_, ": ", arg.name, " has rank ",
                  arg.dims.size(), "; it takes 1 to ", kMaxRank);
  // `flatten` makes rank 1 of any rank.
  HD_CHECK_BUNDLE(!arg.is_flat || arg.dims.size() == 1, name_, ": ", arg.name, " is flat and has rank ",
                  arg.dims.size());
  // Merged to one dimension it would be `flat`.
  HD_CHECK_BUNDLE(!arg.is_merged || (!arg.is_flat && arg.dims.size() > 1), name_, ": ", arg.name,
                  " is merged and flat, or of rank 1");
  // The two may be the same view, which the check of what overlaps lets pass for this pair alone.
  HD_CHECK_BUNDLE(arg.in_place_of < 0 || (arg.is_mutated && static_cast<size_t>(arg.in_place_of) < args_.size() &&
                                          args_[static_cast<size_t>(arg.in_place_of)].is_tensor()),
                  name_, ": ", arg.name, " is in place of no tensor, or is not written");
  // `accept` swaps the two dimensions.
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
    // `bind_symbols` divides by it.
    HD_CHECK_BUNDLE(dim.any || dim.factor > 0, name_, ": dimension ", int{d}, " of ", arg.name, " is ", dim.factor);
    // Of any size: `accept` computes a wanted size all the same, 1 * sizes[kSymbols], without a branch.
    rule.symbol[d] = kSymbols;
    rule.factor[d] = 1;
    if (dim.any) {
      rule.any_sizes |= static_cast<uint8_t>(1u << d);
      continue;
    }
    // A quotient is computed after the symbols: it cannot give one its value.
    const bool plain = dim.divisor == 1 && dim.divisor_arg < 0;
    if (plain) {
      rule.symbol[d] = dim.symbol;
      rule.factor[d] = dim.factor;
    } else {
      rule.symbol[d] = derive(dim);
    }
    dim.binds = plain && dim.symbol < kSymbols && binders[dim.symbol] == index && !bound[dim.symbol];
    if (dim.binds) bound[dim.symbol] = true;
    // Where a symbol stands twice in one tensor, the first occurrence binds and the second is checked against it.
    (dim.binds ? binders_ : checks_).push_back({index, d, rule.symbol[d], rule.factor[d]});
  }
  tensors_.push_back(rule);
}

/// Index in Call::sizes of a quotient. Equal quotients share one, so that a call divides once.
uint8_t Op::derive(const Dim& dim) {
  HD_CHECK_BUNDLE(dim.symbol < kSymbols && (dim.divisor_arg >= 0 || dim.divisor >= 1), name_, ": dimension ",
                  print_dim(dim, args_), " is no quotient of a size");
  size_t i = 0;
  // Linear: an op has at most four.
  while (i < derived_.size() && (derived_[i].symbol != dim.symbol || derived_[i].factor != dim.factor ||
                                 derived_[i].divisor != dim.divisor || derived_[i].divisor_arg != dim.divisor_arg))
    ++i;
  if (i == derived_.size()) derived_.push_back({dim.symbol, dim.factor, dim.divisor, dim.divisor_arg});
  HD_CHECK_BUNDLE(derived_.size() <= kMaxDerived, name_, ": more than ", kMaxDerived, " quotients of sizes");
  // Call::sizes has the symbols, then the 1 of literal sizes, then the quotients.
  return static_cast<uint8_t>(kSymbols + 1 + i);
}

namespace {
/// Linear: asked while ops and bundles are read, never by a call. One of another kind is none: an expression that took
/// a float for a tensor would read what no call has written.
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
/// The workspace is no argument of the op, but a kernel takes it as one.
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
