// test_expr.cpp -- every leaf, operator and error of expressions.
#include "expr.h"

#include <optional>

#include "calls.h"
#include "testing.h"

namespace hdispatch {
namespace {

using namespace testing;

constexpr int64_t kMin = INT64_MIN;
constexpr int64_t kMax = INT64_MAX;

Call sizes(int64_t m, int64_t k = 0, int64_t n = 0) {
  Call call{};
  call.sizes[kM] = m;
  call.sizes[kK] = k;
  call.sizes[kN] = n;
  return call;
}

std::optional<int64_t> value(const Expr& made, const Call& call) {
  int64_t out = 0;
  return made.evaluate(call, out) ? std::optional(out) : std::nullopt;
}

/// `a op b`: once with both as constants, once with a as M and b as K, once with b as a stride.
std::optional<int64_t> binary(int64_t a, const char* op, int64_t b) {
  const auto constants = value(expr(a, b, op), sizes(0));
  const auto symbols = value(expr("M", "K", op), sizes(a, b));
  const auto mixed = value(expr("M", b, op), sizes(a));
  Call call = sizes(0);
  call.tensors[kInput].strides[0] = a;
  const auto stride = value(expr("input.stride(0)", b, op), call);
  CHECK(constants == symbols);
  CHECK(constants == mixed);
  CHECK(constants == stride);
  return constants;
}

TEST(leaves) {
  Call call = sizes(3, 5, 7);
  call.tensors[kInput].sizes[1] = 11;
  call.tensors[kInput].strides[0] = 13;
  call.tensors[kResidual].strides[3] = -17;
  CHECK(value(expr(42), call) == 42);
  CHECK(value(expr(kMin), call) == kMin);
  CHECK(value(expr("M"), call) == 3);
  CHECK(value(expr("K"), call) == 5);
  CHECK(value(expr("N"), call) == 7);
  CHECK(value(expr("input.size(1)"), call) == 11);
  CHECK(value(expr("input.stride(0)"), call) == 13);
  CHECK(value(expr("residual.stride(3)"), call) == -17);
  CHECK(value(Expr(), call) == 0);
  CHECK(Expr().is_constant());
  CHECK(expr(1).is_constant());
  CHECK(!expr("M").is_constant());
}

TEST(sum_difference_product) {
  CHECK(binary(2, "+", 3) == 5);
  CHECK(binary(2, "-", 3) == -1);
  CHECK(binary(-2, "*", 3) == -6);
  CHECK(binary(kMax, "+", 0) == kMax);
  CHECK(binary(kMin, "-", 0) == kMin);
}

TEST(division_and_modulo_round_down) {
  // Python's // and %.
  const struct {
    int64_t a, b, quotient, remainder;
  } cases[] = {
      {7, 2, 3, 1},
      {-7, 2, -4, 1},
      {7, -2, -4, -1},
      {-7, -2, 3, -1},
      {6, 3, 2, 0},
      {-6, 3, -2, 0},
      {6, -3, -2, 0},
      {0, 5, 0, 0},
      {0, -5, 0, 0},
      {1, kMax, 0, 1},
      {-1, kMax, -1, kMax - 1},
      {kMin, 1, kMin, 0},
      {kMin, kMin, 1, 0},
      {kMax, kMin, -1, -1},
      {kMin, kMax, -2, kMax - 1},
      {-16, 16, -1, 0},
      {-15, 16, -1, 1},
  };
  for (const auto& c : cases) {
    CHECK(binary(c.a, "//", c.b) == c.quotient);
    CHECK(binary(c.a, "%", c.b) == c.remainder);
  }
}

TEST(minimum_maximum) {
  CHECK(binary(2, "min", 3) == 2);
  CHECK(binary(3, "min", 2) == 2);
  CHECK(binary(kMin, "max", kMax) == kMax);
  CHECK(binary(-1, "max", -2) == -1);
}

TEST(comparisons_and_logic_are_0_or_1) {
  for (const int64_t a : {kMin, int64_t{-1}, int64_t{0}, int64_t{1}, int64_t{2}, kMax})
    for (const int64_t b : {kMin, int64_t{-1}, int64_t{0}, int64_t{1}, int64_t{2}, kMax}) {
      CHECK(binary(a, "==", b) == (a == b));
      CHECK(binary(a, "!=", b) == (a != b));
      CHECK(binary(a, "<", b) == (a < b));
      CHECK(binary(a, "<=", b) == (a <= b));
      CHECK(binary(a, ">", b) == (a > b));
      CHECK(binary(a, ">=", b) == (a >= b));
      CHECK(binary(a, "and", b) == (a != 0 && b != 0));
      CHECK(binary(a, "or", b) == (a != 0 || b != 0));
    }
}

TEST(overflow_has_no_value) {
  CHECK(!binary(kMax, "+", 1));
  CHECK(!binary(kMin, "+", -1));
  CHECK(!binary(kMin, "-", 1));
  CHECK(!binary(0, "-", kMin));
  CHECK(!binary(kMax, "*", 2));
  CHECK(!binary(kMin, "*", -1));
  CHECK(!binary(kMin, "//", -1));
  CHECK(!binary(kMin, "%", -1));
  // In the middle of an expression too.
  CHECK(!value(expr("M", 4, "*", 4, "//"), sizes(kMax / 2)));
}

TEST(division_by_zero_has_no_value) {
  CHECK(!binary(1, "//", 0));
  CHECK(!binary(0, "//", 0));
  CHECK(!binary(1, "%", 0));
  CHECK(!value(expr("M", "K", "//", 0, "*"), sizes(4, 0)));
}

TEST(rounded_up_division) {
  // The form that grids have; recognised and shortened, so every order and every edge.
  for (const int64_t block : {1, 2, 3, 4, 16, 128})
    for (const int64_t m : {int64_t{0}, int64_t{1}, block - 1, block, block + 1, int64_t{8192}, int64_t{1} << 40}) {
      const int64_t wanted = m / block + (m % block != 0);
      CHECK(value(expr("M", block - 1, "+", block, "//"), sizes(m)) == wanted);
      CHECK(value(expr(block - 1, "M", "+", block, "//"), sizes(m)) == wanted);
      CHECK(value(expr("N", block - 1, "+", block, "//"), sizes(1, 2, m)) == wanted);
    }
  // Nearly that form, but not it.
  CHECK(value(expr("M", 4, "+", 4, "//"), sizes(4)) == 2);
  CHECK(value(expr("M", 3, "-", 4, "//"), sizes(4)) == 0);
  CHECK(value(expr("M", 3, "+", 4, "%"), sizes(4)) == 3);
  CHECK(value(expr("M", "K", "+", 4, "//"), sizes(4, 5)) == 2);
  CHECK(value(expr(1, 3, "+", 4, "//"), sizes(9)) == 1);
  CHECK(value(expr("M", -5, "+", -4, "//"), sizes(13)) == -2);
  // At the end of int64 the short form overflows as the long one does.
  CHECK(!value(expr("M", 3, "+", 4, "//"), sizes(kMax - 2)));
  CHECK(value(expr("M", 3, "+", 4, "//"), sizes(kMax - 3)) == kMax / 4);
  CHECK(!value(expr("M", kMax - 1, "+", kMax, "//"), sizes(2)));
  CHECK(value(expr("M", kMax - 1, "+", kMax, "//"), sizes(1)) == 1);
}

TEST(divisible_strides) {
  // The form that guards have; any stride, any divisor.
  for (const int64_t divisor : {1, 2, 3, 8, 16, 24, -16})
    for (const int64_t stride : {0, 1, 3, 8, 15, 16, 17, 24, 48, 4096, -16, -8, -1}) {
      Call call = sizes(1);
      call.tensors[kInput].strides[0] = stride;
      CHECK(value(expr("input.stride(0)", divisor, "%", 0, "=="), call) == (stride % divisor == 0));
      CHECK(value(expr("input.stride(0)", divisor, "%", 1, "=="), call) ==
            (divisor > 1 && ((stride % divisor) + divisor) % divisor == 1));
      CHECK(value(expr("input.stride(0)", divisor, "%", 0, "!="), call) == (stride % divisor != 0));
      call.tensors[kInput].sizes[1] = stride;
      CHECK(value(expr("input.size(1)", divisor, "%", 0, "=="), call) == (stride % divisor == 0));
    }
  CHECK(!value(expr("input.stride(0)", 0, "%", 0, "=="), sizes(1)));
}

/// The token's value is `number`, whatever kind of leaf it is.
Call call_of(int64_t number) {
  Call call = sizes(0, number);
  call.tensors[kInput].sizes[1] = call.tensors[kInput].strides[0] = number;
  call.integers[1] = number;
  return call;
}

TEST(short_forms_of_every_leaf) {
  // The same over two constants, which no form shortens, is what they are compared with.
  const FindArg integer = [](std::string_view name) { return name == "count" ? 1 : -1; };
  constexpr int64_t kNumbers[] = {kMin, kMin + 1, -17, -16, -1, 0, 1, 2, 15, 16, 17, 48, kMax - 15, kMax - 1, kMax};
  const auto number = [](int64_t n) { return Token(n); };
  for (const std::string leaf : {"K", "input.size(1)", "input.stride(0)", "count"})
    for (const int64_t a : kNumbers)
      for (const int64_t b : kNumbers) {
        const auto same = [&](auto... rest) {
          const auto shortened = value(Expr({Token(leaf), rest...}, toy_tensor, integer), call_of(a));
          // x + 0 is no form: the whole code runs.
          return shortened ==
                 value(Expr({Token(leaf), number(0), Token("+"), rest...}, toy_tensor, integer), call_of(a));
        };
        for (const char* op : {">=", "<=", "==", "!=", "<", ">", "//", "%", "+", "*"})
          CHECK(same(number(b), Token(op)));
        CHECK(same(number(b), Token("%"), number(0), Token("==")));
        CHECK(same(number(b), Token("%"), number(1), Token("==")));
        for (const int64_t c : {b, b == kMax ? b : b + 1, int64_t{16}})
          if (leaf != "K" || a >= 0) CHECK(same(number(b), Token("+"), number(c), Token("//")));  // no size is negative
        for (const int64_t most : kNumbers)
          CHECK(same(number(b), Token(">="), Token(leaf), number(most), Token("<="), Token("and")));
      }
  // Two leaves of one kind are not one leaf.
  Call call = call_of(5);
  call.tensors[kInput].sizes[0] = 100;
  CHECK(value(expr("input.size(1)", 1, ">=", "input.size(0)", 9, "<=", "and"), call) == 0);
  CHECK(value(expr("K", 1, ">=", "N", 9, "<=", "and"), sizes(0, 5, 100)) == 0);
}

TEST(nested) {
  // ((M + 15) // 16) * ((K + 63) // 64) - (N min 2)
  const Expr made = expr("M", 15, "+", 16, "//", "K", 63, "+", 64, "//", "*", "N", 2, "min", "-");
  CHECK(value(made, sizes(33, 130, 9)) == 3 * 3 - 2);
  // As deep as is allowed.
  std::vector<Token> deep;
  for (uint32_t i = 0; i < Expr::kMaxDepth; ++i) deep.emplace_back(int64_t{1});
  for (uint32_t i = 1; i < Expr::kMaxDepth; ++i) deep.emplace_back(std::string("+"));
  CHECK(value(Expr(deep, toy_tensor), sizes(0)) == Expr::kMaxDepth);
}

TEST(bad_expressions_are_refused) {
  CHECK_FAULT(kBundle, "expression of 0 tokens leaves 0 values", Expr({}, toy_tensor));
  CHECK_FAULT(kBundle, "leaves 2 values", expr(1, 2));
  CHECK_FAULT(kBundle, "operator \"+\" has 1 operands", expr(1, "+"));
  CHECK_FAULT(kBundle, "operator \"and\" has 0 operands", expr("and"));
  CHECK_FAULT(kBundle, "operator \"+\" has 1 operands", expr(1, 2, "+", "+"));
  CHECK_FAULT(kBundle, "unknown token \"\"", expr(""));
  CHECK_FAULT(kBundle, "unknown token \"/\"", expr(1, 2, "/"));
  CHECK_FAULT(kBundle, "unknown token \"m\"", expr("m"));
  CHECK_FAULT(kBundle, "unknown token \"M \"", expr("M "));
  CHECK_FAULT(kBundle, "unknown token \"M", expr(std::string("M\0", 2)));
  CHECK_FAULT(kBundle, "unknown token \"12\"", expr("12"));
  CHECK_FAULT(kBundle, "no tensor \"other\"", expr("other.size(0)"));
  CHECK_FAULT(kBundle, "no tensor \"\"", expr(".size(0)"));
  CHECK_FAULT(kBundle, "no tensor \"epsilon\"", expr("epsilon.size(0)"));
  CHECK_FAULT(kBundle, "dimensions are below 4", expr("input.size(4)"));
  for (const char* token :
       {"input.size(-1)", "input.size()", "input.size(1", "input.size(1))", "input.size( 1)", "input.size(99999999999)",
        "input.rank(0)", "input", "input.", "input.size", ")", ".)", "input.size(0x1)", "input.stride(1.0)"})
    CHECK_FAULT(kBundle, "unknown token", expr(token));
  std::vector<Token> deep(Expr::kMaxDepth + 1, int64_t{1});
  CHECK_FAULT(kBundle, "deeper than 16", Expr(deep, toy_tensor));
  std::vector<Token> wide(Expr::kMaxTokens + 1, Token(int64_t{1}));
  CHECK_FAULT(kBundle, "expression has 1025 tokens; it takes at most 1024", Expr(wide, toy_tensor));
}

}  // namespace
}  // namespace hdispatch

TEST_MAIN()
