// test_op_tensors.cpp -- tensors of every kind: `x` gives M and K, `y` is what is looked at.
#include <optional>

#include "ops.h"

namespace hdispatch {
namespace {

using namespace testing;

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

}  // namespace
}  // namespace hdispatch

TEST_MAIN()
