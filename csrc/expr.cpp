// expr.cpp -- compiling and evaluating postfix expressions.
#include "expr.h"

#include <bit>
#include <charconv>
#include <utility>

#include "check.h"

namespace hdispatch {
namespace {

constexpr std::string_view kOperators[] = {
    "+", "-", "*", "//", "%", "min", "max", "==", "!=", "<", "<=", ">", ">=", "and", "or"};

/// `name.size(i)` or `name.stride(i)`.
bool parse_dimension(std::string_view token, std::string_view& tensor, bool& stride, uint32_t& dimension) {
  const size_t dot = token.rfind('.');
  if (dot == std::string_view::npos || token.back() != ')') return false;
  const std::string_view field = token.substr(dot + 1);
  tensor = token.substr(0, dot);
  stride = field.starts_with("stride(");
  if (!stride && !field.starts_with("size(")) return false;
  const char* first = field.data() + (stride ? 7 : 5);
  const char* last = field.data() + field.size() - 1;
  const auto [end, error] = std::from_chars(first, last, dimension);
  return error == std::errc() && end == last;
}

}  // namespace

Expr::Expr(const std::vector<Token>& tokens, const FindArg& find_tensor, const FindArg& find_integer) {
  HD_CHECK_BUNDLE(tokens.size() <= kMaxTokens, "expression has ", tokens.size(), " tokens; it takes at most ",
                  kMaxTokens);
  uint32_t depth = 0;
  for (const Token& token : tokens) {
    Step step{};
    if (const auto* number = std::get_if<int64_t>(&token)) {
      step = {Code::kPush, 0, 0, *number};
    } else {
      const std::string& word = std::get<std::string>(token);
      std::string_view tensor;
      bool stride = false;
      uint32_t dimension = 0;
      if (const int symbol = symbol_named(word); symbol >= 0) {
        step = {Code::kSymbol, 0, static_cast<uint8_t>(symbol), 0};
      } else if (parse_dimension(word, tensor, stride, dimension)) {
        const int index = find_tensor(tensor);
        HD_CHECK_BUNDLE(index >= 0, "expression names \"", word, "\", but the op has no tensor \"", tensor, "\"");
        HD_CHECK_BUNDLE(dimension < kMaxRank, "expression names \"", word, "\"; dimensions are below ", kMaxRank);
        step = {stride ? Code::kStride : Code::kSize, static_cast<uint8_t>(index), static_cast<uint8_t>(dimension), 0};
      } else if (const int argument = find_integer ? find_integer(word) : -1; argument >= 0) {
        step = {Code::kInteger, static_cast<uint8_t>(argument), 0, 0};
      } else {
        size_t index = 0;
        while (index < std::size(kOperators) && kOperators[index] != word) ++index;
        HD_CHECK_BUNDLE(index < std::size(kOperators), "expression holds the unknown token \"", word, "\"");
        HD_CHECK_BUNDLE(depth >= 2, "operator \"", word, "\" has ", depth, " operands; it takes 2");
        step.code = static_cast<Code>(static_cast<size_t>(Code::kAdd) + index);
        depth -= 2;
      }
    }
    HD_CHECK_BUNDLE(++depth <= kMaxDepth, "expression is deeper than ", kMaxDepth);
    steps_.push_back(step);
  }
  HD_CHECK_BUNDLE(depth == 1, "expression of ", tokens.size(), " tokens leaves ", depth,
                  " values; it leaves exactly 1");
  shorten();
}

/// Recognises the common forms, so that `evaluate` need not interpret them.
void Expr::shorten() {
  form_ = Form::kCode;
  const Step& first = steps_[0];
  if (steps_.size() == 1 && first.is(Code::kPush)) {
    form_ = Form::kConst;
    constant_ = first.value;
    return;
  }
  // c + leaf is leaf + c: the leaf is the first step of every form that has one.
  if (steps_.size() > 2 && first.is(Code::kPush) && steps_[1].is_leaf() && steps_[2].is(Code::kAdd))
    std::swap(steps_[0], steps_[1]);
  if (!first.is_leaf()) return;
  shorten_leaf();
  tensor_ = first.tensor;
  symbol_ = first.dimension;
  // Those that `evaluate` has a case for.
  if (form_ == Form::kLeaf && first.is(Code::kSymbol)) form_ = Form::kSymbol;
  if (form_ == Form::kLeaf && first.is(Code::kStride)) form_ = Form::kStride;
  if (form_ == Form::kCeilDiv && first.is(Code::kSymbol)) form_ = Form::kSizeCeilDiv;
  if (form_ == Form::kDivisible && first.is(Code::kStride)) form_ = Form::kStrideDivisible;
}

/// The forms of one leaf, which is the first step.
void Expr::shorten_leaf() {
  const size_t count = steps_.size();
  if (count == 1) form_ = Form::kLeaf;
  if (count < 3 || !steps_[1].is(Code::kPush)) return;
  const int64_t number = steps_[1].value;
  const Code code = steps_[2].code;
  constant_ = INT64_MIN;
  most_ = INT64_MAX;
  if (count == 3 && (code == Code::kGe || code == Code::kLe || code == Code::kEq)) {
    form_ = Form::kWithin;
    if (code != Code::kLe) constant_ = number;
    if (code != Code::kGe) most_ = number;
  } else if (count == 3 && code == Code::kDiv && number > 0) {
    form_ = Form::kFloorDiv;
    constant_ = number;
  } else if (count == 5 && code == Code::kMod && number > 0 && std::has_single_bit(static_cast<uint64_t>(number)) &&
             steps_[3].is(Code::kPush, 0) && steps_[4].is(Code::kEq)) {
    form_ = Form::kDivisible;
    constant_ = number - 1;
  } else if (count == 5 && code == Code::kAdd && number >= 0 && number < INT64_MAX &&
             steps_[3].is(Code::kPush, number + 1) && steps_[4].is(Code::kDiv)) {
    form_ = Form::kCeilDiv;
    constant_ = number + 1;
  } else if (count == 7 && code == Code::kGe && steps_[3].is(steps_[0].code) && steps_[3].tensor == steps_[0].tensor &&
             steps_[3].dimension == steps_[0].dimension && steps_[4].is(Code::kPush) && steps_[5].is(Code::kLe) &&
             steps_[6].is(Code::kAnd)) {
    form_ = Form::kWithin;
    constant_ = number;
    most_ = steps_[4].value;
  }
}

bool Expr::apply(Code code, int64_t a, int64_t b, int64_t& out) noexcept {
  switch (code) {
    case Code::kAdd:
      return !__builtin_add_overflow(a, b, &out);
    case Code::kSub:
      return !__builtin_sub_overflow(a, b, &out);
    case Code::kMul:
      return !__builtin_mul_overflow(a, b, &out);
    case Code::kDiv:
    case Code::kMod: {
      if (b == 0 || (a == INT64_MIN && b == -1)) return false;
      const int64_t remainder = a % b;
      const bool round = remainder != 0 && ((remainder < 0) != (b < 0));
      out = code == Code::kDiv ? a / b - round : remainder + (round ? b : 0);
      return true;
    }
    case Code::kMin:
      out = a < b ? a : b;
      return true;
    case Code::kMax:
      out = a > b ? a : b;
      return true;
    case Code::kEq:
      out = a == b;
      return true;
    case Code::kNe:
      out = a != b;
      return true;
    case Code::kLt:
      out = a < b;
      return true;
    case Code::kLe:
      out = a <= b;
      return true;
    case Code::kGt:
      out = a > b;
      return true;
    case Code::kGe:
      out = a >= b;
      return true;
    case Code::kAnd:
      out = a && b;
      return true;
    case Code::kOr:
      out = a || b;
      return true;
    default:
      return false;
  }
}

int64_t Expr::load(const Step& leaf, const Call& call) noexcept {
  switch (leaf.code) {
    case Code::kSymbol:
      return call.sizes[leaf.dimension];
    case Code::kSize:
      return call.tensors[leaf.tensor].sizes[leaf.dimension];
    case Code::kStride:
      return call.tensors[leaf.tensor].strides[leaf.dimension];
    default:
      return call.integers[leaf.tensor];
  }
}

bool Expr::evaluate_leaf(const Call& call, int64_t& value) const noexcept {
  const int64_t leaf = load(steps_[0], call);  // it may be negative
  int64_t sum = leaf;
  switch (form_) {
    case Form::kWithin:
      value = leaf >= constant_ && leaf <= most_;
      return true;
    case Form::kDivisible:
      value = (leaf & constant_) == 0;
      return true;
    case Form::kCeilDiv:
      if (__builtin_add_overflow(leaf, constant_ - 1, &sum)) return false;
      [[fallthrough]];
    case Form::kFloorDiv:
      value = sum / constant_ - (sum % constant_ < 0);
      return true;
    default:  // kLeaf
      value = leaf;
      return true;
  }
}

bool Expr::evaluate_code(const Call& call, int64_t& value) const noexcept {
  int64_t stack[kMaxDepth];
  int64_t* top = stack;
  for (const Step& step : steps_) {
    if (step.is(Code::kPush)) {
      *top++ = step.value;
    } else if (step.is_leaf()) {
      *top++ = load(step, call);
    } else {
      if (!apply(step.code, top[-2], top[-1], top[-2])) return false;
      --top;
    }
  }
  value = stack[0];
  return true;
}

}  // namespace hdispatch
