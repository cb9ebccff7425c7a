// test_expr_fuzz.cpp -- random streams of tokens: the same verdict and the same value as a naive interpreter.
#include <optional>

#include "calls.h"
#include "testing.h"

namespace hdispatch {
namespace {

using namespace testing;

__extension__ typedef __int128 Wide;

constexpr const char* kOperators[] = {
    "+", "-", "*", "//", "%", "min", "max", "==", "!=", "<", "<=", ">", ">=", "and", "or"};
constexpr const char* kLeaves[] = {"M", "K", "N", "input.size(0)", "input.stride(0)", "scale.stride(1)", "count"};
constexpr const char* kWrong[] = {"", "m", "input.size(9)", "nobody.size(0)", "input.size(", "**", "not", "(", "1"};
constexpr int64_t kNumbers[] = {0, 1, 2, 3, 4, 15, 16, 127, 128, -1, -2, -16, INT64_MAX, INT64_MAX - 1, INT64_MIN};

/// What the text of expr.h and manifest.py says, in 128 bits; nothing where there is no value.
std::optional<int64_t> apply(const std::string& op, Wide a, Wide b) {
  Wide out = 0;
  const auto floor_div = [](Wide x, Wide y) { return x / y - ((x % y != 0) && ((x % y < 0) != (y < 0))); };
  if (op == "+")
    out = a + b;
  else if (op == "-")
    out = a - b;
  else if (op == "*")
    out = a * b;
  else if (op == "//" || op == "%") {
    if (b == 0) return std::nullopt;
    const Wide quotient = floor_div(a, b);
    if (quotient > INT64_MAX) return std::nullopt;  // INT64_MIN by -1: neither has a value
    out = op == "%" ? a - quotient * b : quotient;
  } else if (op == "min")
    out = a < b ? a : b;
  else if (op == "max")
    out = a > b ? a : b;
  else if (op == "==")
    out = a == b;
  else if (op == "!=")
    out = a != b;
  else if (op == "<")
    out = a < b;
  else if (op == "<=")
    out = a <= b;
  else if (op == ">")
    out = a > b;
  else if (op == ">=")
    out = a >= b;
  else if (op == "and")
    out = a && b;
  else if (op == "or")
    out = a || b;
  if (out > INT64_MAX || out < INT64_MIN) return std::nullopt;
  return static_cast<int64_t>(out);
}

int64_t leaf(const std::string& word, const Call& call) {
  if (word == "M") return call.sizes[kM];
  if (word == "K") return call.sizes[kK];
  if (word == "N") return call.sizes[kN];
  if (word == "input.size(0)") return call.tensors[kInput].sizes[0];
  if (word == "input.stride(0)") return call.tensors[kInput].strides[0];
  if (word == "count") return call.integers[kEpsilon];
  return call.tensors[kScale].strides[1];
}

bool is_in(const std::string& word, const auto& words) {
  for (const char* each : words)
    if (word == each) return true;
  return false;
}

/// Whether the stream is an expression at all.
bool is_valid(const std::vector<Token>& stream) {
  uint32_t depth = 0;
  for (const Token& token : stream) {
    const auto* word = std::get_if<std::string>(&token);
    if (word && is_in(*word, kOperators)) {
      if (depth < 2) return false;
      depth -= 1;
    } else {
      if (word && !is_in(*word, kLeaves)) return false;
      if (++depth > Expr::kMaxDepth) return false;
    }
  }
  return depth == 1;
}

std::optional<int64_t> naive(const std::vector<Token>& stream, const Call& call) {
  std::vector<int64_t> stack;
  for (const Token& token : stream) {
    if (const auto* number = std::get_if<int64_t>(&token)) {
      stack.push_back(*number);
      continue;
    }
    const std::string& word = std::get<std::string>(token);
    if (!is_in(word, kOperators)) {
      stack.push_back(leaf(word, call));
      continue;
    }
    const int64_t b = stack.back();
    stack.pop_back();
    const auto result = apply(word, stack.back(), b);
    if (!result) return std::nullopt;
    stack.back() = *result;
  }
  return stack.back();
}

Call random_call(Random& random) {
  Call call{};
  for (int64_t& size : call.sizes) size = random.one_in(3) ? INT64_MAX - random.in(0, 128) : random.in(0, 300);
  call.tensors[kInput].sizes[0] = random.in(0, 300);
  call.tensors[kInput].strides[0] = random.one_in(3) ? random.of(kNumbers) : 8 * random.in(-4, 40);
  call.tensors[kScale].strides[1] = random.of(kNumbers);
  call.integers[kEpsilon] = random.one_in(2) ? random.of(kNumbers) : random.in(-300, 300);
  return call;
}

Token random_leaf(Random& random) {
  if (random.one_in(2)) return std::string(random.of(kLeaves));
  return random.of(kNumbers);
}

/// Compiles and holds verdict and values against the naive ones; returns whether it was an expression.
bool check(const std::vector<Token>& stream, Random& random) {
  const bool valid = is_valid(stream);
  std::optional<Expr> made;
  try {
    made.emplace(stream, toy_tensor, [](std::string_view name) { return name == "count" ? int{kEpsilon} : -1; });
  } catch (const Error& error) {
    CHECK(error.fault() == Fault::kBundle);
  }
  CHECK_EQ(made.has_value(), valid);
  if (!made || !valid) return false;
  for (int i = 0; i < 4; ++i) {
    const Call call = random_call(random);
    int64_t value = 0;
    const bool has_value = made->evaluate(call, value);
    const auto wanted = naive(stream, call);
    CHECK_EQ(has_value, wanted.has_value());
    if (has_value && wanted) CHECK_EQ(value, *wanted);
  }
  return true;
}

TEST(random_streams) {
  Random random(3);
  int valid = 0;
  for (int i = 0; i < 60'000; ++i) {
    std::vector<Token> stream;
    for (int64_t n = random.in(0, 12); n > 0; --n) {
      if (random.one_in(40))
        stream.emplace_back(std::string(random.of(kWrong)));
      else if (random.one_in(2))
        stream.emplace_back(std::string(random.of(kOperators)));
      else
        stream.push_back(random_leaf(random));
    }
    valid += check(stream, random);
  }
  CHECK(valid > 1000);
}

TEST(random_expressions) {
  // Grown from the root, so that nearly all are valid; some too deep.
  Random random(4);
  int valid = 0;
  for (int i = 0; i < 20'000; ++i) {
    std::vector<Token> stream = {random_leaf(random)};
    for (int64_t n = random.in(0, 24); n > 0; --n) {
      // Replace a random leaf by `leaf leaf operator`.
      auto at = stream.begin() + random.in(0, static_cast<int64_t>(stream.size()) - 1);
      const auto* word = std::get_if<std::string>(&*at);
      if (word && is_in(*word, kOperators)) continue;
      at = stream.insert(at + 1, random_leaf(random));
      stream.insert(at + 1, std::string(random.of(kOperators)));
    }
    valid += check(stream, random);
  }
  CHECK(valid > 15'000);
}

TEST(the_shortened_forms) {
  // What `Expr` recognises, and what is one token away from it.
  Random random(5);
  for (int i = 0; i < 20'000; ++i) {
    const int64_t c = random.one_in(4) ? random.of(kNumbers) : random.in(-4, 64);
    std::vector<Token> stream;
    if (random.one_in(2)) {
      stream = tokens(random.one_in(2) ? "M" : "count", c == INT64_MIN ? c : c - 1, "+", c, "//");
      if (random.one_in(2)) std::swap(stream[0], stream[1]);
    } else if (random.one_in(2)) {
      stream =
          tokens("count", c, ">=", "count", random.one_in(4) ? random.of(kNumbers) : random.in(-4, 300), "<=", "and");
    } else {
      stream = tokens("input.stride(0)", c, "%", 0, "==");
    }
    if (random.one_in(3)) {
      const auto at = static_cast<size_t>(random.in(0, static_cast<int64_t>(stream.size()) - 1));
      const auto* word = std::get_if<std::string>(&stream[at]);
      stream[at] = word && is_in(*word, kOperators) ? Token(std::string(random.of(kOperators))) : random_leaf(random);
    }
    check(stream, random);
  }
}

}  // namespace
}  // namespace hdispatch

TEST_MAIN()
