// test_op_values.cpp -- integers and flags that an op was compiled for, and what is None or absent.
#include "ops.h"

namespace hdispatch {
namespace {

using namespace testing;

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
    call.tensors[2] = contiguous(1, kF32, {64}, where);  // compared with the absent one, which gives 0
    CHECK_CONTAINS(complaint(call, op), "bias has size(0) = 64; it takes 0 ([K] with K = 0)");
    call = given;
    call.tensors[1].dtype = DType::kNone;
    CHECK_CONTAINS(complaint(call, op), "x is None; it takes a tensor [M]");
  }
}

}  // namespace
}  // namespace hdispatch

TEST_MAIN()
