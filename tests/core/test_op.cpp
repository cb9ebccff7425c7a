// test_op.cpp -- what an op accepts, sizes and variant that it finds, and what it says about the rest.
#include "ops.h"

namespace hdispatch {
namespace {

using namespace testing;

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

TEST(names) {
  CHECK_EQ(toy().find_tensor("residual"), int{kResidual});
  CHECK_EQ(toy().find_tensor("epsilon"), -1);
  CHECK_EQ(toy().find_float("epsilon"), int{kEpsilon});
  CHECK_EQ(toy().find_float("input"), -1);
  CHECK_EQ(toy().find_variant("float16+scale_ub+residual"), 3);
  CHECK_EQ(toy().find_variant(""), -1);
  CHECK((toy().mutated() == std::vector<uint8_t>{kResult, kScale, kResidual}));
}

}  // namespace
}  // namespace hdispatch

TEST_MAIN()
