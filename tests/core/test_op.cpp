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

TEST(signatures_hold_four_bits_of_each_argument) {
  Signature bits, mask;
  for (uint32_t i = 0; i < kMaxArgs; ++i) bits.set(i, (i * 7 + 3) % 15);
  for (uint32_t i = 0; i < kMaxArgs; ++i) CHECK_EQ(bits.get(i), (i * 7 + 3) % 15);
  for (uint32_t i = 0; i < kMaxArgs; ++i) {
    Signature other = bits, mine;
    other.set(i, ~bits.get(i) & 15);
    mine.set(i, 15);
    CHECK(!(bits == other) && !bits.same_but(mask, other) && bits.same_but(mine, other));
  }
}

/// out! [M], 16 floats of which nothing depends, late [M] of two dtypes, mode "" or "fp8\0" or "fp8", last!? [M]: 20.
Op wide() {
  std::vector<ArgSpec> args = {tensor_arg("out", {symbol(kM)}, {DType::kFloat32})};
  args[0].is_mutated = true;
  for (int i = 0; i < 16; ++i) args.push_back(float_arg("f" + std::to_string(i), 0.0));
  args.push_back(tensor_arg("late", {symbol(kM)}, {DType::kFloat32, DType::kBFloat16}));
  args.push_back(int_arg("mode", {0, 1, 2}));
  args.back().kind = ArgKind::kString;
  args.back().texts = {"", std::string("fp8\0", 4), "fp8"};
  args.push_back(tensor_arg("last", {symbol(kM)}, {DType::kFloat32}));
  args.back().is_mutated = args.back().is_optional = true;
  std::vector<Variant> variants;
  for (const bool last : {false, true})
    for (const DType dtype : {DType::kFloat32, DType::kBFloat16})
      for (uint64_t mode = 1; mode <= 3; ++mode) {
        Signature bits = signature({{0, DType::kFloat32}, {17, dtype}});
        bits.set(18, mode);
        if (last) bits.set(19, static_cast<uint64_t>(DType::kFloat32));
        variants.push_back({std::to_string(variants.size()), bits});
      }
  return Op(0, "wide", "", args, variants);
}

TEST(arguments_beyond_the_sixteenth) {
  const Op op = wide();
  uint16_t expected = 0;
  for (const bool last : {false, true})
    for (const DType dtype : {DType::kFloat32, DType::kBFloat16})
      for (const std::string& mode : op.args()[18].texts) {
        Call call{};
        call.tensors[0] = contiguous(1, DType::kFloat32, {5});
        call.tensors[17] = contiguous(2, dtype, {5});
        call.tensors[19] = last ? contiguous(3, DType::kFloat32, {5}) : absent();
        call.texts[18] = {mode.data(), mode.size()};
        call.integers[18] = op.args()[18].position(call.texts[18]);
        Call wrong = call, other = call;
        const Found found = bind(op, call);
        CHECK(found.ok);
        CHECK_EQ(found.variant, expected++);
        wrong.tensors[17].dtype = DType::kFloat16;
        CHECK_CONTAINS(complaint(wrong, op), "wide: late has dtype float16; it takes float32 or bfloat16");
        other.texts[18] = {"fp8\0\1", 5};
        other.integers[18] = op.args()[18].position(other.texts[18]);
        uint16_t variant = 0;
        DeviceSlot slot = kNoSlot;
        CHECK(op.bind(other, variant, slot) == Bound::kUnserved);
        CHECK_EQ(op.unserved(other), std::string("mode is \"fp8\\x00\\x01\", served are \"\" \"fp8\\x00\" \"fp8\""));
        CHECK_EQ(op.unserved_argument(other), std::string("mode"));
      }
}

TEST(bad_declarations_are_refused) {
  const auto make = [](auto change) {
    std::vector<ArgSpec> args = toy_args();
    std::vector<Variant> variants = toy_variants();
    change(args, variants);
    return Op(0, "bad", "", args, variants);
  };
  CHECK_FAULT(kBundle, "bad: no variants", make([](auto&, auto& variants) { variants.clear(); }));
  CHECK_FAULT(kBundle, "bad: 33 arguments", make([](auto& args, auto&) { args.resize(33, float_arg("more", 0)); }));
  CHECK_FAULT(kBundle, "weight has rank 0", make([](auto& args, auto&) { args[kWeight].dims.clear(); }));
  CHECK_FAULT(kBundle, "weight has rank 5", make([](auto& args, auto&) { args[kWeight].dims.resize(5); }));
  CHECK_FAULT(kBundle, "dimension 1 of scale is 0", make([](auto& args, auto&) { args[kScale].dims[1] = exactly(0); }));
  CHECK_FAULT(kBundle, "no tensor carries the size N plainly",
              make([](auto& args, auto&) { args[kScale].dims[1] = quotient(kN, 128); }));
  CHECK_FAULT(kBundle, "dimension N/0 is no quotient of a size",
              make([](auto& args, auto&) { args[kScale].dims[1] = quotient(kN, 0); }));
  CHECK_FAULT(kBundle, "more than 4 quotients of sizes", make([](auto& args, auto&) {
                for (int64_t i = 0; i < 5; ++i)
                  args.push_back(tensor_arg("more" + std::to_string(i), {quotient(kK, 2 + i)}, {DType::kFloat32}));
              }));
  CHECK_FAULT(kBundle, "weight is flat and has rank 2", make([](auto& args, auto&) {
                args[kWeight].is_flat = true;
                args[kWeight].dims.push_back(exactly(2));
              }));
  CHECK_FAULT(kBundle, "weight is column-major and has rank 1",
              make([](auto& args, auto&) { args[kWeight].layout = Layout::kColumns; }));
  CHECK_FAULT(kBundle, "more lists 14 values", make([](auto& args, auto&) {
                args.push_back(int_arg("more", {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13}));
              }));
  CHECK_FAULT(kBundle, "no required tensor carries the size M plainly", make([](auto& args, auto&) {
                for (const ToyArg i : {kResult, kInput, kScale}) args[i].dims[0] = exactly(1);
              }));
  CHECK_FAULT(kBundle, "no required tensor carries the size M plainly", make([](auto& args, auto&) {
                for (const ToyArg i : {kResult, kInput, kScale, kResidual}) args[i].dims[0] = exactly(1);
              }));
}

// ---- one tensor of every kind: `x` gives M and K, `y` is what is looked at ----

/// An op of `x` [M, K] and of `y`, which may have any strides and sizes in `x`'s place, and those more.
struct OneTensor {
  explicit OneTensor(ArgSpec y, std::vector<ArgSpec> more = {}) : op(make(std::move(y), std::move(more))) {}

  static Op make(ArgSpec y, std::vector<ArgSpec> more) {
    std::vector<ArgSpec> args = {tensor_arg("x", {symbol(kM), symbol(kK)}, {DType::kFloat32}), std::move(y)};
    args.insert(args.end(), more.begin(), more.end());
    return Op(0, "one", "", args, {{"any", signature({{0, DType::kFloat32}, {1, DType::kFloat32}})}});
  }

  Call call(int64_t m, int64_t k, const TensorView& y) const {
    Call out{};
    out.tensors[0] = contiguous(1, DType::kFloat32, {m, k});
    out.tensors[1] = y;
    return out;
  }
  /// `y` as the kernel sees it; nothing if the call is refused.
  std::optional<TensorView> bound(int64_t m, int64_t k, const TensorView& y) const {
    Call made = call(m, k, y);
    if (!bind(op, made).ok) return std::nullopt;
    CHECK_EQ(made.sizes[kM], m);
    CHECK_EQ(made.sizes[kK], k);
    return made.tensors[1];
  }
  std::string refusal(int64_t m, int64_t k, const TensorView& y) const { return complaint(call(m, k, y), op); }

  Op op;
};

ArgSpec y_arg(std::vector<Dim> dims, Layout layout = Layout::kContiguous) {
  ArgSpec arg = tensor_arg("y", std::move(dims), {DType::kFloat32});
  arg.layout = layout;
  return arg;
}

ArgSpec written(ArgSpec arg) {
  arg.is_mutated = true;
  return arg;
}

TensorView strided(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides) {
  TensorView view = contiguous(2, DType::kFloat32, sizes);
  for (size_t d = 0; d < strides.size(); ++d) view.strides[d] = strides[d];
  return view;
}

TensorView plain(const std::vector<int64_t>& sizes) { return strided(sizes, {}); }

/// `[sizes] [strides]` of what a call is bound to.
std::string shown(const std::optional<TensorView>& view) {
  if (!view) return "refused";
  std::string out;
  for (const int64_t* items : {view->sizes, view->strides}) {
    out += out.empty() ? "" : " ";
    for (uint32_t d = 0; d < view->rank; ++d) out += (d ? "," : "") + std::to_string(items[d]);
  }
  return out;
}

TEST(quotients_round_up) {
  const OneTensor one(y_arg({symbol(kM), quotient(kK, 128)}));
  for (const auto& [k, blocks] : {std::pair{1, 1}, {127, 1}, {128, 1}, {129, 2}, {256, 2}, {257, 3}, {0, 0}}) {
    CHECK(one.bound(4, k, plain({4, blocks})));
    CHECK(!one.bound(4, k, plain({4, blocks + 1})));
  }
  CHECK_CONTAINS(one.refusal(4, 129, plain({4, 1})), "one: y has size(1) = 1; it takes 2 ([M, K/128] with K = 129)");
  Dim twice = quotient(kK, 3);
  twice.factor = 2;
  const OneTensor doubled(y_arg({twice}));
  for (const auto& [k, thirds] : {std::pair{1, 1}, {2, 2}, {3, 2}, {4, 3}, {0, 0}})
    CHECK(doubled.bound(1, k, plain({thirds})));
  CHECK_CONTAINS(doubled.refusal(1, 4, plain({2})), "it takes 3 ([2*K/3] with K = 4)");
}

TEST(quotients_by_an_argument) {
  const OneTensor one(y_arg({symbol(kM), quotient_by(kK, 2)}), {int_arg("group", {64, 128})});
  const auto bound = [&](int64_t k, int64_t blocks, int64_t group) {
    Call call = one.call(4, k, plain({4, blocks}));
    call.integers[2] = group;
    uint16_t variant = 0;
    DeviceSlot slot = kNoSlot;
    const Bound found = one.op.bind(call, variant, slot);
    if (found == Bound::kWrong) {
      try {
        one.op.complain(call);
      } catch (const Error& error) {
        return std::string(error.what());
      }
    }
    // The toy variant has no nibble for the argument: a listed value has no variant either.
    return std::string(found == Bound::kYes ? "yes" : "unserved");
  };
  CHECK_CONTAINS(bound(129, 2, 128), "no variant takes this combination of dtypes");
  CHECK_EQ(bound(129, 5, 32), "unserved");
  CHECK_EQ(bound(129, 1, INT64_MAX), "unserved");
  CHECK_EQ(bound(0, 0, 1), "unserved");
  CHECK_CONTAINS(bound(129, 4, 32), "y has size(1) = 4; it takes 5 ([M, K/group] with K = 129)");
  for (const int64_t group : {int64_t{0}, int64_t{-1}, INT64_MIN})
    CHECK_CONTAINS(bound(129, 2, group), text("group is ", group, "; it takes at least 1"));
}

TEST(any_sizes) {
  const OneTensor one(y_arg({any_size(), any_size()}));
  for (const std::vector<int64_t>& sizes : std::vector<std::vector<int64_t>>{{0, 0}, {1, 7}, {9, 0}, {100, 3}})
    CHECK(one.bound(4, 64, plain(sizes)));
  CHECK(!one.bound(4, 64, strided({100, 3}, {4, 1})));
  CHECK_CONTAINS(one.refusal(4, 64, plain({100})), "y has rank 1 (sizes [100]); it takes rank 2, [*, *]");
  CHECK(OneTensor(y_arg({any_size(), symbol(kK)}, Layout::kRows)).bound(4, 64, strided({9, 64}, {65, 1})));
  CHECK(!OneTensor(y_arg({any_size(), symbol(kK)})).bound(4, 64, plain({9, 65})));
}

TEST(flat_tensors) {
  ArgSpec arg = y_arg({symbol(kM)});
  arg.is_flat = true;
  const OneTensor one(arg);
  for (const std::vector<int64_t>& sizes :
       std::vector<std::vector<int64_t>>{{6}, {6, 1}, {1, 6}, {2, 3}, {1, 2, 3}, {6, 1, 1, 1}, {1, 1, 1, 6}})
    CHECK_EQ(shown(one.bound(6, 64, plain(sizes))), "6 1");
  CHECK_EQ(shown(one.bound(0, 64, plain({3, 0}))), "0 1");
  CHECK_EQ(shown(one.bound(1, 64, strided({}, {}))), "1 1");
  CHECK_EQ(shown(one.bound(1, 64, strided({1, 1}, {7, 9}))), "1 1");  // strides that mean nothing
  CHECK_EQ(shown(one.bound(6, 64, strided({6, 1}, {1, 9}))), "6 1");
  CHECK_EQ(shown(one.bound(6, 64, strided({6}, {2}))), "refused");
  CHECK_EQ(shown(one.bound(6, 64, strided({6, 1}, {2, 1}))), "refused");  // a column of a wider tensor
  CHECK_EQ(shown(one.bound(6, 64, strided({2, 3}, {1, 2}))), "refused");  // transposed
  CHECK_EQ(shown(one.bound(6, 64, strided({2, 3}, {0, 1}))), "refused");
  CHECK_EQ(shown(one.bound(6, 64, plain({1}))), "refused");
  CHECK_CONTAINS(one.refusal(6, 64, strided({6, 1}, {2, 1})), "y with sizes [6, 1] is not contiguous");
  CHECK_CONTAINS(one.refusal(6, 64, strided({6}, {2})), "y has stride(0) = 2");
  CHECK_CONTAINS(one.refusal(6, 64, plain({5, 1})), "y has size(0) = 5; it takes 6 ([M] with M = 6)");
  TensorView deep = plain({1, 1, 1, 1});
  deep.rank = 5;
  CHECK_CONTAINS(one.refusal(1, 64, deep), "y has rank 5 (sizes [1, 1, 1, 1, ...]); it takes at most 4");
}

TEST(broadcast_tensors) {
  ArgSpec arg = y_arg({symbol(kM)});
  arg.is_flat = arg.is_broadcast = true;
  const OneTensor one(arg);
  for (const std::vector<int64_t>& sizes : std::vector<std::vector<int64_t>>{{}, {1}, {1, 1}, {1, 1, 1, 1}}) {
    CHECK_EQ(shown(one.bound(6, 64, plain(sizes))), "6 0");
    CHECK_EQ(shown(one.bound(1, 64, plain(sizes))), "1 1");
    CHECK_EQ(shown(one.bound(0, 64, plain(sizes))), "0 1");
  }
  CHECK_EQ(shown(one.bound(6, 64, plain({6, 1}))), "6 1");
  CHECK_EQ(shown(one.bound(0, 64, plain({0}))), "0 1");
  CHECK_EQ(shown(one.bound(6, 64, plain({2}))), "refused");
  CHECK_EQ(shown(one.bound(6, 64, plain({0}))), "refused");
  CHECK_EQ(shown(one.bound(6, 64, strided({6}, {0}))), "refused");
  CHECK_CONTAINS(one.refusal(6, 64, plain({2})), "y has size(0) = 2; it takes 6");
  CHECK_CONTAINS(one.refusal(6, 64, strided({6}, {0})), "y has stride(0) = 0");
}

TEST(a_broadcast_tensor_gives_no_size) {
  ArgSpec first = tensor_arg("scales", {symbol(kM)}, {DType::kFloat32});
  first.is_flat = first.is_broadcast = true;
  const Op op(0, "scaled", "", {first, tensor_arg("x", {symbol(kM)}, {DType::kFloat32})},
              {{"any", signature({{0, DType::kFloat32}, {1, DType::kFloat32}})}});
  Call call{};
  call.tensors[0] = plain({1});
  call.tensors[1] = plain({5});
  CHECK(bind(op, call).ok);
  CHECK_EQ(call.sizes[kM], 5);
  CHECK_EQ(call.tensors[0].strides[0], 0);
  CHECK_FAULT(kBundle, "scaled: no tensor carries the size M plainly",
              Op(0, "scaled", "", {first}, {{"any", signature({{0, DType::kFloat32}})}}));
}

TEST(padded_tensors) {
  const auto padded = [](std::vector<Dim> dims, Layout layout = Layout::kContiguous) {
    ArgSpec arg = y_arg(std::move(dims), layout);
    arg.is_padded = true;
    return OneTensor(arg);
  };
  const OneTensor one = padded({symbol(kM), any_size(), symbol(kK)});
  CHECK_EQ(shown(one.bound(4, 64, plain({4, 64}))), "4,1,64 64,64,1");
  CHECK_EQ(shown(one.bound(4, 64, plain({4, 3, 64}))), "4,3,64 192,64,1");
  CHECK_EQ(shown(one.bound(1, 64, strided({1, 64}, {5, 1}))), "1,1,64 64,64,1");
  CHECK_EQ(shown(one.bound(0, 64, plain({0, 64}))), "0,1,64 64,64,1");
  CHECK_EQ(shown(one.bound(4, 64, strided({4, 64}, {80, 1}))), "refused");
  CHECK_CONTAINS(one.refusal(4, 64, plain({64})), "y has rank 1 (sizes [64]); it takes rank 3, [M, *, K]");
  CHECK_CONTAINS(one.refusal(4, 64, plain({4, 1, 1, 64})), "y has rank 4");
  CHECK_CONTAINS(one.refusal(4, 64, plain({4, 65})), "y has size(2) = 65; it takes 64");
  const OneTensor rows = padded({symbol(kM), any_size(), symbol(kK)}, Layout::kRows);
  CHECK_EQ(shown(rows.bound(4, 64, strided({4, 64}, {80, 1}))), "4,1,64 80,64,1");
  CHECK_EQ(shown(rows.bound(4, 64, strided({4, 64}, {80, 2}))), "refused");
  const OneTensor any = padded({symbol(kM), any_size(), symbol(kK)}, Layout::kAny);
  CHECK_EQ(shown(any.bound(4, 64, strided({4, 64}, {1, 4}))), "4,1,64 1,64,4");
  const OneTensor deep = padded({symbol(kM), any_size(), any_size(), symbol(kK)}, Layout::kAny);
  CHECK_EQ(shown(deep.bound(4, 64, strided({4, 64}, {100, 1}))), "4,1,1,64 100,64,64,1");
  CHECK_EQ(shown(deep.bound(4, 64, strided({4, 3, 64}, {1000, 100, 1}))), "4,1,3,64 1000,192,100,1");
}

TEST(columns) {
  const OneTensor one(y_arg({symbol(kK), symbol(kM)}, Layout::kColumns));
  CHECK_EQ(shown(one.bound(4, 64, strided({64, 4}, {1, 64}))), "64,4 1,64");
  CHECK_EQ(shown(one.bound(4, 64, strided({64, 4}, {1, 80}))), "64,4 1,80");
  CHECK_EQ(shown(one.bound(4, 64, strided({64, 4}, {1, 0}))), "64,4 1,0");
  CHECK_EQ(shown(one.bound(4, 64, plain({64, 4}))), "refused");  // row-major
  CHECK_EQ(shown(one.bound(4, 64, strided({64, 4}, {2, 128}))), "refused");
  // Of a dimension of size 1 the stride is that of a packed tensor: row-major or not is the same then.
  CHECK_EQ(shown(one.bound(1, 64, plain({64, 1}))), "64,1 1,64");
  CHECK_EQ(shown(one.bound(1, 64, strided({64, 1}, {1, 7}))), "64,1 1,64");
  CHECK_EQ(shown(one.bound(1, 64, strided({64, 1}, {2, 1}))), "refused");
  CHECK_EQ(shown(one.bound(4, 1, plain({1, 4}))), "1,4 1,1");
  CHECK_EQ(shown(one.bound(4, 1, strided({1, 4}, {9, 32}))), "1,4 1,32");
  CHECK_EQ(shown(one.bound(4, 0, strided({0, 4}, {1, 1}))), "0,4 1,1");
  CHECK_EQ(shown(one.bound(0, 64, strided({64, 0}, {1, 64}))), "64,0 1,64");
  CHECK_CONTAINS(one.refusal(4, 64, plain({64, 4})),
                 "y has stride(0) = 4 with sizes [64, 4]; it takes 1 (column-major: only stride(1) is free)");
  const OneTensor target(written(y_arg({symbol(kK), symbol(kM)}, Layout::kColumns)));
  CHECK(target.bound(4, 64, strided({64, 4}, {1, 64})));
  CHECK(target.bound(4, 64, strided({64, 4}, {1, 65})));
  CHECK_CONTAINS(target.refusal(4, 64, strided({64, 4}, {1, 63})),
                 "y has stride(1) = 63 with sizes [64, 4]; it is written and takes at least 64");
}

TEST(any_strides) {
  const OneTensor one(y_arg({symbol(kM), symbol(kK)}, Layout::kAny));
  for (const auto& strides : std::vector<std::vector<int64_t>>{{64, 1}, {1, 4}, {0, 0}, {1000, 7}, {1, 1}})
    CHECK_EQ(shown(one.bound(4, 64, strided({4, 64}, strides))), text("4,64 ", strides[0], ",", strides[1]));
  CHECK_EQ(shown(one.bound(1, 64, strided({1, 64}, {0, 5}))), "1,64 64,5");
  const OneTensor target(written(y_arg({symbol(kM), symbol(kK)}, Layout::kAny)));
  for (const auto& strides : std::vector<std::vector<int64_t>>{{64, 1}, {1, 4}, {1000, 7}})
    CHECK(target.bound(4, 64, strided({4, 64}, strides)));
  for (const auto& strides : std::vector<std::vector<int64_t>>{{0, 1}, {64, 0}, {-64, 1}, {64, -1}})
    CHECK_CONTAINS(target.refusal(4, 64, strided({4, 64}, strides)), "it is written and takes at least 1");
  CHECK(target.bound(1, 64, strided({1, 64}, {0, 1})));  // one row cannot overlap itself
}

// ---- integers, flags, what is None ----

enum ChoosingArg { kX, kGroup, kHeads, kRound, kQuiet, kShape };

/// x [M], group 64 or 128, heads >= 2 at run time, round (False only), quiet (ignored), shape (None only).
Op choosing() {
  std::vector<ArgSpec> args = {tensor_arg("x", {symbol(kM)}, {DType::kFloat32, DType::kFloat16}),
                               int_arg("group", {64, 128}),
                               int_arg("heads", {}, 2),
                               flag_arg("round", {0}),
                               flag_arg("quiet", {}),
                               none_arg("shape")};
  std::vector<Variant> variants;
  for (const uint64_t group : {1, 2}) {
    Signature bits = signature({{0, DType::kFloat32}});
    bits.set(kGroup, group);
    bits.set(kRound, 1);
    variants.push_back({"group" + std::to_string(group), bits});
  }
  return Op(0, "choosing", "", args, variants);
}

Call choice(int64_t group, int64_t heads, int64_t round = 0, int64_t quiet = 0, int64_t shape = 0) {
  Call call{};
  call.tensors[kX] = plain({4});
  for (const auto& [arg, value] :
       {std::pair{kGroup, group}, {kHeads, heads}, {kRound, round}, {kQuiet, quiet}, {kShape, shape}})
    call.integers[arg] = value;
  return call;
}

Bound bind_choice(const Op& op, Call call, uint16_t& variant) {
  DeviceSlot slot = kNoSlot;
  return op.bind(call, variant, slot);
}

TEST(compiled_in_values) {
  const Op op = choosing();
  uint16_t variant = 9;
  CHECK(bind_choice(op, choice(64, 2), variant) == Bound::kYes);
  CHECK_EQ(variant, 0);
  CHECK(bind_choice(op, choice(128, INT64_MAX, 0, 1), variant) == Bound::kYes);
  CHECK_EQ(variant, 1);
  const std::pair<Call, const char*> unserved[] = {
      {choice(32, 2), "group is 32, served are 64 128"},
      {choice(INT64_MIN, 2), "group is -9223372036854775808, served are 64 128"},
      {choice(64, 2, 1), "round is 1, served are 0"},
      {choice(64, 2, 0, 0, 1), "shape is given, None is served"},
      {choice(0, 2, 1, 1, 1),
       "group is 0, served are 64 128; round is 1, served are 0; shape is given, None is served"},
  };
  for (const auto& [call, words] : unserved) {
    CHECK(bind_choice(op, call, variant) == Bound::kUnserved);
    CHECK_EQ(op.unserved(call), std::string(words));
  }
  CHECK_CONTAINS(complaint(choice(64, 1), op), "choosing: heads is 1; it takes at least 2");
  CHECK_CONTAINS(complaint(choice(32, -7), op), "choosing: heads is -7; it takes at least 2");
}

TEST(a_value_that_is_not_served_excuses_nothing) {
  const Op op = choosing();
  uint16_t variant = 0;
  Call call = choice(32, 2, 0, 0, 1);
  call.tensors[kX].dtype = DType::kInt64;
  CHECK(bind_choice(op, call, variant) == Bound::kWrong);
  CHECK_CONTAINS(complaint(call, op), "choosing: x has dtype int64; it takes float32 or float16");
  call.tensors[kX].dtype = DType::kFloat16;  // accepted by itself, but of no variant
  CHECK_CONTAINS(complaint(call, op), "no variant takes this combination of dtypes (x float16)");
  call.tensors[kX].dtype = DType::kFloat32;
  CHECK(bind_choice(op, call, variant) == Bound::kUnserved);
  call.tensors[kX].strides[0] = 2;
  CHECK_CONTAINS(complaint(call, op), "x has stride(0) = 2");
}

TEST(finding_integers) {
  const Op op = choosing();
  CHECK_EQ(op.find_integer("heads"), int{kHeads});
  CHECK_EQ(op.find_integer("group"), int{kGroup});
  CHECK_EQ(op.find_integer("round"), int{kRound});
  CHECK_EQ(op.find_integer("shape"), -1);
  CHECK_EQ(op.find_integer("x"), -1);
  CHECK_EQ(op.find_integer("nobody"), -1);
}

// ---- sizes of optional tensors ----

TEST(a_size_of_an_absent_tensor_is_0) {
  // The optional tensor comes first, so what binds K does before what binds M.
  std::vector<ArgSpec> args = {tensor_arg("weight", {symbol(kK), symbol(kN)}, {DType::kFloat32}),
                               tensor_arg("x", {symbol(kM)}, {DType::kFloat32}),
                               tensor_arg("bias", {symbol(kK)}, {DType::kFloat32})};
  args[0].is_optional = args[2].is_optional = true;
  constexpr auto kF32 = DType::kFloat32;
  const Op op(0, "maybe", "", args,
              {{"any", signature({{1, kF32}})},
               {"weight", signature({{0, kF32}, {1, kF32}})},
               {"bias", signature({{1, kF32}, {2, kF32}})}});
  for (const DeviceSlot where : {kCpuSlot, DeviceSlot{3}}) {
    Call call{};
    // What an absent tensor's view holds besides its dtype is whatever was on the stack.
    call.tensors[0] = contiguous(1, DType::kNone, {7, 9}, 5);
    call.tensors[1] = contiguous(1, kF32, {4}, where);
    call.tensors[2] = contiguous(1, DType::kNone, {7}, 5);
    Call given = call;
    Found found = bind(op, call);
    CHECK(found.ok);
    CHECK_EQ(found.variant, 0);
    CHECK_EQ(found.slot, where);
    CHECK_EQ(call.sizes[kM], 4);
    CHECK_EQ(call.sizes[kK], 0);
    CHECK_EQ(call.sizes[kN], 0);
    call = given;
    call.tensors[0] = contiguous(1, kF32, {64, 8}, where);
    found = bind(op, call);
    CHECK(found.ok);
    CHECK_EQ(found.variant, 1);
    CHECK_EQ(call.sizes[kK], 64);
    CHECK_EQ(call.sizes[kN], 8);
    call = given;
    call.tensors[2] = contiguous(1, kF32, {64}, where);  // held against the absent one, which gives 0
    CHECK_CONTAINS(complaint(call, op), "bias has size(0) = 64; it takes 0 ([K] with K = 0)");
    call = given;
    call.tensors[1].dtype = DType::kNone;
    CHECK_CONTAINS(complaint(call, op), "x is None; it takes a tensor [M]");
  }
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
