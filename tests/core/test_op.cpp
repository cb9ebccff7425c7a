// test_op.cpp -- what an op accepts, sizes and variant that it finds, and what it says about the rest.
#include "op.h"

#include <optional>

#include "calls.h"
#include "testing.h"

namespace hdispatch {
namespace {

using namespace testing;

const Op& toy() {
  static const Op op(0, "toy", "toy(...) -> ()", toy_args(), toy_variants());
  return op;
}

struct Found {
  bool ok;
  uint16_t variant;
  DeviceSlot slot;
};

Found bind(const Op& op, Call& call) {
  Found out{false, 0xffff, kNoSlot};
  out.ok = op.bind(call, out.variant, out.slot) == Bound::kYes;
  return out;
}

/// What `complain` says about a call that `bind` refuses.
std::string complaint(Call call, const Op& op = toy()) {
  const Call given = call;
  CHECK(!bind(op, call).ok);
  try {
    op.complain(given);
  } catch (const Error& error) {
    CHECK(error.fault() == Fault::kCaller);
    return error.what();
  }
}

void check_bound(Call call, int64_t m, int64_t k, uint16_t variant) {
  const Found bound = bind(toy(), call);
  CHECK(bound.ok);
  CHECK_EQ(bound.variant, variant);
  CHECK_EQ(call.sizes[kM], m);
  CHECK_EQ(call.sizes[kK], k);
  CHECK_EQ(call.sizes[kN], 0);
}

TEST(valid_calls) {
  for (const int64_t m : {1, 2, 15, 16, 17, 8192})
    for (const int64_t k : {1, 64, 512, 513}) {
      check_bound(toy_call(m, k, false, DType::kBFloat16), m, k, 0);
      check_bound(toy_call(m, k, false, DType::kFloat16), m, k, 1);
      check_bound(toy_call(m, k, true, DType::kBFloat16), m, k, 2);
      check_bound(toy_call(m, k, true, DType::kFloat16), m, k, 3);
    }
  check_bound(toy_call(0, 64), 0, 64, 0);
  check_bound(toy_call(4, 0), 4, 0, 0);
}

TEST(slot_is_the_tensors_device) {
  for (const DeviceSlot slot : {kCpuSlot, DeviceSlot{1}, DeviceSlot{8}, kNoSlot}) {
    Call call = toy_call(4, 64, true, DType::kBFloat16, slot);
    const Found bound = bind(toy(), call);
    CHECK(bound.ok);
    CHECK_EQ(bound.slot, slot);
  }
}

TEST(a_one_element_tensor_may_have_rank_0) {
  Call call = toy_call(4, 64, true);
  call.tensors[kScaleUb].rank = 0;
  const Found bound = bind(toy(), call);
  CHECK(bound.ok);
  CHECK_EQ(call.tensors[kScaleUb].rank, 1u);
  CHECK_EQ(call.tensors[kScaleUb].sizes[0], 1);
  call = toy_call(4, 64);
  call.tensors[kWeight].rank = 0;
  CHECK_CONTAINS(complaint(call), "toy: weight has rank 0 (sizes []); it takes rank 1, [K]");
}

TEST(free_rows_and_strides_that_mean_nothing) {
  for (const int64_t stride : {0, 1, 63, 65, 128, 1 << 20}) {
    Call call = toy_call(4, 64);
    call.tensors[kInput].strides[0] = stride;
    check_bound(call, 4, 64, 0);
  }
  // Of a dimension of size 1 the stride is whatever torch likes; bind makes it that of a contiguous tensor.
  Call call = toy_call(1, 64);
  call.tensors[kInput].strides[0] = 7;
  call.tensors[kResult].strides[0] = -3;
  call.tensors[kScale].strides[0] = 0;
  call.tensors[kScale].strides[1] = 99;
  CHECK(bind(toy(), call).ok);
  CHECK_EQ(call.tensors[kInput].strides[0], 64);
  CHECK_EQ(call.tensors[kResult].strides[0], 64);
  CHECK_EQ(call.tensors[kScale].strides[0], 1);
  CHECK_EQ(call.tensors[kScale].strides[1], 1);
}

TEST(rows_that_are_written_do_not_overlap) {
  std::vector<ArgSpec> args = toy_args();
  args[kResult].layout = Layout::kRows;
  const Op op(0, "strided", "", args, toy_variants());
  for (const int64_t stride : {64, 65, 1000}) {
    Call call = toy_call(4, 64);
    call.tensors[kResult].strides[0] = stride;
    CHECK(bind(op, call).ok);
  }
  for (const int64_t stride : {0, 1, 63, -64}) {
    Call call = toy_call(4, 64);
    call.tensors[kResult].strides[0] = stride;
    CHECK_CONTAINS(complaint(call, op), "strided: result has stride(0) = ");
  }
}

TEST(every_rule_in_words) {
  Call call = toy_call(4, 64);
  call.tensors[kWeight] = absent();
  CHECK_CONTAINS(complaint(call), "toy: weight is None; it takes a tensor [K]");

  call = toy_call(4, 64);
  call.tensors[kInput].dtype = DType::kFloat32;
  CHECK_CONTAINS(complaint(call), "toy: input has dtype float32; it takes bfloat16 or float16");

  call = toy_call(4, 64);
  call.tensors[kResult].dtype = DType::kOther;
  CHECK_CONTAINS(complaint(call), "toy: result has dtype other; it takes float8_e4m3fn");

  call = toy_call(4, 64);
  call.tensors[kWeight].dtype = DType::kFloat16;
  CHECK_CONTAINS(complaint(call),
                 "toy: no variant takes this combination of dtypes (result float8_e4m3fn, input bfloat16");

  call = toy_call(4, 64, true);
  call.tensors[kScaleUb] = absent();  // each is optional, but these variants take both or neither
  CHECK_CONTAINS(complaint(call),
                 "scale_ub None, residual bfloat16); variants are bfloat16, float16, bfloat16+scale_ub");

  call = toy_call(4, 64);
  call.tensors[kInput] = contiguous(2, DType::kBFloat16, {2, 2, 64});
  CHECK_CONTAINS(complaint(call), "toy: input has rank 3 (sizes [2, 2, 64]); it takes rank 2, [M, K]");

  call = toy_call(4, 64);
  call.tensors[kInput].rank = 64;  // only the first kMaxRank sizes are known
  CHECK_CONTAINS(complaint(call), "toy: input has rank 64 (sizes [4, 64, 0, 0, ...]); it takes rank 2, [M, K]");

  call = toy_call(4, 64);
  call.tensors[kScale].slot = 2;
  CHECK_CONTAINS(complaint(call), "toy: scale is on cuda:1; result is on cpu; all tensors are on one device");

  call = toy_call(4, 64);
  call.tensors[kResult].slot = kNoSlot;
  CHECK_CONTAINS(complaint(call), "is on cpu; result is on another device");

  call = toy_call(4, 64);
  call.tensors[kInput].strides[1] = 2;
  CHECK_CONTAINS(
      complaint(call),
      "toy: input has stride(1) = 2 with sizes [4, 64]; it takes 1 (only stride(0) is free); call .contiguous()");

  call = toy_call(4, 64);
  call.tensors[kResult].strides[0] = 128;
  CHECK_CONTAINS(complaint(call), "toy: result has stride(0) = 128 with sizes [4, 64]; it takes 64 (contiguous)");

  call = toy_call(4, 64);
  call.tensors[kWeight].sizes[0] = 63;
  CHECK_CONTAINS(complaint(call), "toy: weight has size(0) = 63; it takes 64 ([K] with K = 64)");

  call = toy_call(4, 64);
  call.tensors[kResult].sizes[0] = 3;
  CHECK_CONTAINS(complaint(call), "toy: result has size(0) = 3; it takes 4 ([M, K] with M = 4)");

  call = toy_call(4, 64);
  call.tensors[kScale] = contiguous(4, DType::kFloat32, {4, 2});
  CHECK_CONTAINS(complaint(call), "toy: scale has size(1) = 2; it takes 1 ([M, 1])");

  call = toy_call(4, 64);
  call.scalars[kEpsilon] = -1e-9;
  CHECK_CONTAINS(complaint(call), "toy: epsilon is -1e-09; it takes a finite float32 of at least 0");
  for (const double value : {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity(), 1e39}) {
    call.scalars[kEpsilon] = value;
    CHECK_CONTAINS(complaint(call), "toy: epsilon is ");
  }

  call = toy_call(1, int64_t{1} << 32);
  CHECK_CONTAINS(complaint(call), "toy: K = 4294967296, N = 0; sizes are below 2^32");
}

TEST(scalars_at_their_limits) {
  for (const double value : {0.0, -0.0, 5e-324, 1e-6, 3.4028234663852886e38}) {
    Call call = toy_call(4, 64);
    call.scalars[kEpsilon] = value;
    check_bound(call, 4, 64, 0);
  }
}

TEST(a_valid_call_is_no_complaint) {
  CHECK_FAULT(kInternal, "bind refused a call that breaks no rule", toy().complain(toy_call(4, 64)));
}

TEST(factors) {
  // As in silu_and_mul: input [M, 2*N] gives N, result is [M, N].
  std::vector<ArgSpec> args = {tensor_arg("result", {symbol(kM), symbol(kN)}, {DType::kFloat32}),
                               tensor_arg("input", {symbol(kM), symbol(kN, 2)}, {DType::kFloat32})};
  args[0].is_mutated = true;
  const Op op(0, "halves", "", args, {{"any", signature({{0, DType::kFloat32}, {1, DType::kFloat32}})}});
  const auto make = [](int64_t result, int64_t input) {
    Call call{};
    call.tensors[0] = contiguous(1, DType::kFloat32, {4, result});
    call.tensors[1] = contiguous(2, DType::kFloat32, {4, input});
    return call;
  };
  Call call = make(6144, 12288);
  CHECK(bind(op, call).ok);
  CHECK_EQ(call.sizes[kN], 6144);
  CHECK_EQ(call.sizes[kK], 0);
  CHECK_CONTAINS(complaint(make(6144, 12289), op), "halves: input has size(1) = 12289; it takes a multiple of 2");
  CHECK_CONTAINS(complaint(make(6143, 12288), op),
                 "halves: result has size(1) = 6143; it takes 6144 ([M, N] with N = 6144)");
}

TEST(bad_declarations_are_refused) {
  const auto make = [](auto change) {
    std::vector<ArgSpec> args = toy_args();
    std::vector<Variant> variants = toy_variants();
    change(args, variants);
    return Op(0, "bad", "", args, variants);
  };
  CHECK_FAULT(kBundle, "bad: no variants", make([](auto&, auto& variants) { variants.clear(); }));
  CHECK_FAULT(kBundle, "bad: 17 arguments", make([](auto& args, auto&) { args.resize(17, float_arg("more", 0)); }));
  CHECK_FAULT(kBundle, "weight has rank 0", make([](auto& args, auto&) { args[kWeight].dims.clear(); }));
  CHECK_FAULT(kBundle, "weight has rank 5", make([](auto& args, auto&) { args[kWeight].dims.resize(5); }));
  CHECK_FAULT(kBundle, "dimension 1 of scale is 0", make([](auto& args, auto&) { args[kScale].dims[1] = exactly(0); }));
  CHECK_FAULT(kBundle, "no required input carries the size N",
              make([](auto& args, auto&) { args[kScale].dims[1] = symbol(kN); }));
  CHECK_FAULT(kBundle, "no required input carries the size M", make([](auto& args, auto&) {
                for (const ToyArg i : {kResult, kInput, kScale, kResidual}) args[i].dims[0] = exactly(1);
              }));
}

TEST(names) {
  CHECK_EQ(toy().find_tensor("residual"), int{kResidual});
  CHECK_EQ(toy().find_tensor("epsilon"), -1);
  CHECK_EQ(toy().find_float("epsilon"), int{kEpsilon});
  CHECK_EQ(toy().find_float("input"), -1);
  CHECK_EQ(toy().find_variant("float16+scale_ub+residual"), 3);
  CHECK_EQ(toy().find_variant(""), -1);
  CHECK((toy().mutated() == std::vector<uint8_t>{kResult, kScale, kResidual}));
}

// ---- random ops and calls: bind refuses exactly what complain complains about ----

constexpr DType kDTypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16, DType::kFloat8E4M3FN, DType::kInt64};

Op random_op(Random& random) {
  std::vector<ArgSpec> args;
  // The first input carries every symbol that is used.
  const auto count = static_cast<uint32_t>(random.in(1, 3));
  std::vector<Dim> all;
  for (uint32_t s = 0; s < count; ++s) all.push_back(symbol(static_cast<Symbol>(s), random.one_in(4) ? 2 : 1));
  args.push_back(tensor_arg("a0", all, {random.of(kDTypes)}));
  args[0].layout = random.one_in(2) ? Layout::kRows : Layout::kContiguous;
  for (int64_t i = 1, n = random.in(2, 7); i < n; ++i) {
    const std::string name = "a" + std::to_string(i);
    if (random.one_in(4)) {
      args.push_back(float_arg(name, random.one_in(2) ? 0.0 : -std::numeric_limits<double>::infinity()));
      continue;
    }
    std::vector<Dim> dims;
    for (int64_t d = random.in(1, 4); d > 0; --d)
      dims.push_back(random.one_in(4) ? exactly(random.in(1, 3))
                                      : symbol(static_cast<Symbol>(random.in(0, count - 1)), random.in(1, 2)));
    ArgSpec arg = tensor_arg(name, dims, {random.of(kDTypes)});
    arg.is_mutated = random.one_in(2);
    arg.is_optional = random.one_in(3);
    arg.layout = random.one_in(2) ? Layout::kRows : Layout::kContiguous;
    args.push_back(arg);
  }
  // All optional tensors present, and all absent.
  std::vector<Variant> variants;
  for (const bool present : {true, false}) {
    uint64_t bits = 0;
    for (size_t i = 0; i < args.size(); ++i)
      if (args[i].is_tensor() && (present || !args[i].is_optional))
        bits |= static_cast<uint64_t>(args[i].dtypes[0]) << 4 * i;
    variants.push_back({present ? "present" : "absent", bits});
  }
  return Op(0, "random", "", args, variants);
}

Call valid_call(const Op& op, bool present, const int64_t (&sizes)[kSymbols], DeviceSlot slot) {
  Call call{};
  for (size_t i = 0; i < op.args().size(); ++i) {
    const ArgSpec& arg = op.args()[i];
    if (!arg.is_tensor()) {
      call.scalars[i] = 0.5;
    } else if (arg.is_optional && !present) {
      call.tensors[i] = absent();
    } else {
      std::vector<int64_t> dims;
      for (const Dim& dim : arg.dims)
        dims.push_back(dim.symbol == kSymbols ? dim.factor : dim.factor * sizes[dim.symbol]);
      call.tensors[i] = contiguous(i + 1, arg.dtypes[0], dims, slot);
    }
  }
  return call;
}

/// Changes one thing at random; often, but not always, for the worse.
void disturb(const Op& op, Call& call, Random& random) {
  const auto i = static_cast<size_t>(random.in(0, static_cast<int64_t>(op.args().size()) - 1));
  if (!op.args()[i].is_tensor()) {
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
  int bound = 0, refused = 0;
  for (int i = 0; i < 400; ++i) {
    const Op op = random_op(random);
    for (int j = 0; j < 100; ++j) {
      int64_t sizes[kSymbols];
      for (int64_t& size : sizes) size = random.in(0, 5);
      const bool present = random.one_in(2);
      Call call = valid_call(op, present, sizes, 1);
      const int64_t changes = random.in(0, 3);
      for (int64_t n = changes; n > 0; --n) disturb(op, call, random);
      const Call given = call;
      const Found result = bind(op, call);
      std::optional<Fault> fault;
      try {
        op.complain(given);
      } catch (const Error& error) {
        fault = error.fault();
        CHECK_CONTAINS(error.what(), "random: ");
      }
      CHECK(fault == (result.ok ? Fault::kInternal : Fault::kCaller));
      (result.ok ? bound : refused)++;
      if (changes == 0) {
        CHECK(result.ok);
        CHECK_EQ(result.variant, present || op.variants()[0].signature == op.variants()[1].signature ? 0 : 1);
        for (size_t s = 0; s < op.args()[0].dims.size(); ++s) CHECK_EQ(call.sizes[s], sizes[s]);
      }
    }
  }
  CHECK(bound > 10'000);
  CHECK(refused > 10'000);
}

}  // namespace
}  // namespace hdispatch

TEST_MAIN()
