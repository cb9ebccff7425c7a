// test_op_fuzz.cpp -- random ops and calls: bind refuses exactly what complain complains about.
#include "ops.h"

namespace hdispatch {
namespace {

using namespace testing;

constexpr DType kDTypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16, DType::kFloat8E4M3FN, DType::kInt64};

/// Layout and reshaping that go with the dimensions that the argument has.
void vary(ArgSpec& arg, Random& random) {
  arg.is_mutated = random.one_in(2);
  arg.is_optional = random.one_in(3);
  const int64_t kind = random.in(0, 9);
  arg.layout = kind < 3 ? Layout::kRows : kind < 5 ? Layout::kAny : Layout::kContiguous;
  if (kind == 5 && arg.dims.size() == 2) arg.layout = Layout::kColumns;
  arg.is_flat = kind > 6 && arg.dims.size() == 1;
  arg.is_broadcast = kind > 7 && arg.is_flat;
  arg.is_padded = kind > 6 && arg.dims.size() > 2;
}

Op random_op(Random& random) {
  std::vector<ArgSpec> args;
  // The first tensor carries every symbol that is used.
  const auto count = static_cast<uint32_t>(random.in(1, 3));
  std::vector<Dim> all;
  for (uint32_t s = 0; s < count; ++s) all.push_back(symbol(static_cast<Symbol>(s), random.one_in(4) ? 2 : 1));
  args.push_back(tensor_arg("a0", all, {random.of(kDTypes)}));
  args[0].layout = random.one_in(2) ? Layout::kRows : Layout::kContiguous;
  args.push_back(int_arg("by", {1, 2}));
  int64_t quotients = 0;
  for (int64_t i = 2, n = random.in(3, 9); i < n; ++i) {
    const std::string name = "a" + std::to_string(i);
    if (random.one_in(6)) {
      args.push_back(float_arg(name, random.one_in(2) ? 0.0 : -std::numeric_limits<double>::infinity()));
      continue;
    }
    if (random.one_in(6)) {
      args.push_back(random.one_in(3)   ? none_arg(name)
                     : random.one_in(2) ? flag_arg(name, {1})
                                        : int_arg(name, {}, random.in(-2, 2)));
      continue;
    }
    std::vector<Dim> dims;
    for (int64_t d = random.in(1, 4); d > 0; --d) {
      const auto which = static_cast<Symbol>(random.in(0, count - 1));
      const bool divides = random.one_in(4) && quotients < 4;
      quotients += divides;
      dims.push_back(random.one_in(4)   ? exactly(random.in(1, 3))
                     : random.one_in(6) ? any_size()
                     : !divides         ? symbol(which, random.in(1, 2))
                     : random.one_in(2) ? quotient_by(which, 1)
                                        : quotient(which, random.in(1, 4)));
    }
    ArgSpec arg = tensor_arg(name, dims, {random.of(kDTypes)});
    vary(arg, random);
    args.push_back(arg);
  }
  // All optional tensors present, and all absent; the quotients are by 1 or by 2; 3 is not listed.
  std::vector<Variant> variants;
  for (const bool present : {true, false})
    for (const uint64_t by : {1, 2}) {
      Signature bits;
      bits.set(1, by);
      for (size_t i = 0; i < args.size(); ++i) {
        if (args[i].is_tensor() && (present || !args[i].is_optional))
          bits.set(static_cast<uint32_t>(i), static_cast<uint64_t>(args[i].dtypes[0]));
        if (args[i].kind == ArgKind::kBool) bits.set(static_cast<uint32_t>(i), 1);
      }
      variants.push_back({std::string(present ? "present" : "absent") + std::to_string(by), bits});
    }
  return Op(0, "random", "", args, variants);
}

int64_t size_of(const Dim& dim, const int64_t (&sizes)[kSymbols], int64_t by) {
  if (dim.any) return 3;
  if (dim.symbol == kSymbols) return dim.factor;
  const int64_t divisor = dim.divisor_arg < 0 ? dim.divisor : by;
  return (dim.factor * sizes[dim.symbol] + divisor - 1) / divisor;
}

/// Every dimension of size 1 where that is allowed is left out or added, one element for a tensor that is broadcast.
Call valid_call(const Op& op, bool present, const int64_t (&sizes)[kSymbols], int64_t by, DeviceSlot slot,
                Random& random) {
  Call call{};
  for (size_t i = 0; i < op.args().size(); ++i) {
    const ArgSpec& arg = op.args()[i];
    if (!arg.is_tensor()) {
      call.scalars[i] = 0.5;
      call.integers[i] = i == 1 ? by : arg.kind == ArgKind::kNone ? 0 : arg.kind == ArgKind::kBool ? 1 : 2;
    } else if (arg.is_optional && !present) {
      call.tensors[i] = absent();
    } else {
      std::vector<int64_t> dims;
      for (const Dim& dim : arg.dims) dims.push_back(size_of(dim, sizes, by));
      if (arg.is_broadcast && random.one_in(2)) dims[0] = 1;
      if (arg.is_flat && random.one_in(2)) dims.insert(random.one_in(2) ? dims.begin() : dims.end(), 1);
      // Left out is a dimension after the first that any size fits, or that is 1 anyway.
      if (arg.is_padded && random.one_in(2) && (arg.dims[1].any || dims[1] == 1)) dims.erase(dims.begin() + 1);
      call.tensors[i] = contiguous(i + 1, arg.dtypes[0], dims, slot);
      if (arg.layout == Layout::kColumns) {
        call.tensors[i].strides[0] = 1;
        call.tensors[i].strides[1] = std::max<int64_t>(dims[0], 1) + 16 * random.in(0, 1);
      }
    }
  }
  return call;
}

/// What a kernel may rely on once a call is bound.
void check_views(const Op& op, const Call& call, const int64_t (&sizes)[kSymbols], int64_t by) {
  for (size_t i = 0; i < op.args().size(); ++i) {
    const ArgSpec& arg = op.args()[i];
    const TensorView& view = call.tensors[i];
    if (!arg.is_tensor() || view.dtype == DType::kNone) continue;
    CHECK_EQ(size_t{view.rank}, arg.dims.size());
    int64_t packed = 1;
    for (size_t n = view.rank; n-- > 0;) {
      const size_t d = arg.layout == Layout::kColumns ? 1 - n : n;
      if (!arg.dims[d].any) CHECK_EQ(view.sizes[d], size_of(arg.dims[d], sizes, by));
      const bool is_free = arg.layout == Layout::kAny || (arg.layout == Layout::kRows && d == 0 && view.rank > 1) ||
                           (arg.layout == Layout::kColumns && d == 1);
      const bool means_nothing = view.sizes[d] <= 1;
      const bool repeats = arg.is_broadcast && view.strides[d] == 0 && view.sizes[d] > 1;
      if (means_nothing || (!is_free && !repeats)) CHECK_EQ(view.strides[d], packed);
      packed *= std::max<int64_t>(view.sizes[d], 1);
    }
  }
}

/// Changes one thing at random; often, but not always, for the worse.
void disturb(const Op& op, Call& call, Random& random) {
  const auto i = static_cast<size_t>(random.in(0, static_cast<int64_t>(op.args().size()) - 1));
  if (!op.args()[i].is_tensor()) {
    constexpr int64_t kIntegers[] = {INT64_MIN, -1, 0, 1, 2, 3, 4, INT64_MAX};
    call.integers[i] = op.args()[i].kind == ArgKind::kInteger ? random.of(kIntegers) : random.in(0, 1);
    constexpr double kValues[] = {0,
                                  -0.0,
                                  1,
                                  -1,
                                  1e39,
                                  -1e39,
                                  1e-300,
                                  std::numeric_limits<double>::infinity(),
                                  std::numeric_limits<double>::quiet_NaN()};
    call.scalars[i] = random.of(kValues);
    return;
  }
  TensorView& view = call.tensors[i];
  constexpr int64_t kSizes[] = {0, 1, 2, 3, 4, 64, int64_t{1} << 31, int64_t{1} << 32, int64_t{1} << 62, INT64_MAX};
  const auto d = static_cast<size_t>(random.in(0, kMaxRank - 1));
  switch (random.in(0, 6)) {
    case 0:
      view.dtype = random.of(kDTypes);
      break;
    case 1:
      view.dtype = DType::kNone;
      break;
    case 2:
      view.rank = static_cast<uint32_t>(random.one_in(4) ? random.in(5, 64) : random.in(0, 4));
      break;
    case 3:
      view.slot = random.one_in(2) ? kCpuSlot : 1;
      break;
    case 4:
      view.sizes[d] = random.of(kSizes);
      break;
    case 5:
      view.strides[d] = random.one_in(2) ? random.of(kSizes) : -view.strides[d];
      break;
    default:
      view.strides[0] = view.strides[0] / 2 + random.in(0, 3);
      break;
  }
}

TEST(bind_and_complain_agree) {
  Random random(6);
  int bound = 0, refused = 0, unserved = 0;
  for (int i = 0; i < 500; ++i) {
    const Op op = random_op(random);
    for (int j = 0; j < 100; ++j) {
      int64_t sizes[kSymbols];
      for (int64_t& size : sizes) size = random.in(0, 5);
      const bool present = random.one_in(2);
      const int64_t by = random.in(1, 3);
      Call call = valid_call(op, present, sizes, by, 1, random);
      const int64_t changes = random.in(0, 3);
      for (int64_t n = changes; n > 0; --n) disturb(op, call, random);
      const Call given = call;
      uint16_t variant = 0xffff;
      DeviceSlot slot = kNoSlot;
      const Bound result = op.bind(call, variant, slot);
      if (result == Bound::kUnserved) {
        CHECK(!op.unserved(given).empty());
        CHECK(changes > 0 || by == 3);
        unserved++;
        continue;
      }
      std::optional<Fault> fault;
      try {
        op.complain(given);
      } catch (const Error& error) {
        fault = error.fault();
        CHECK_CONTAINS(error.what(), "random: ");
      }
      CHECK(fault == (result == Bound::kYes ? Fault::kInternal : Fault::kCaller));
      (result == Bound::kYes ? bound : refused)++;
      if (changes == 0) {
        CHECK(result == Bound::kYes);
        const Variant& found = op.variants()[variant];
        const Variant& wanted = op.variants()[static_cast<size_t>(present ? by - 1 : by + 1)];
        CHECK(found.signature == wanted.signature);
        CHECK_EQ(slot, DeviceSlot{1});
        for (size_t s = 0; s < op.args()[0].dims.size(); ++s) CHECK_EQ(call.sizes[s], sizes[s]);
        check_views(op, call, sizes, by);
      }
    }
  }
  CHECK(bound > 10'000);
  CHECK(refused > 10'000);
  CHECK(unserved > 1'000);
}

}  // namespace
}  // namespace hdispatch

TEST_MAIN()
