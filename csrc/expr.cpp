// expr.cpp -- compiling and evaluating postfix expressions.
#include "expr.h"

#include <bit>
#include <charconv>

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
  if (steps_.size() == 1 && steps_[0].code == Code::kPush) {
    form_ = Form::kConst;
    constant_ = steps_[0].value;
  } else if (steps_.size() == 1 && steps_[0].code == Code::kSymbol) {
    form_ = Form::kSymbol;
    symbol_ = steps_[0].dimension;
  } else if (steps_.size() == 1 && steps_[0].code == Code::kStride) {
    form_ = Form::kStride;
    tensor_ = steps_[0].tensor;
    symbol_ = steps_[0].dimension;
  } else if (steps_.size() == 5 && steps_[0].code == Code::kStride && steps_[1].code == Code::kPush &&
             std::has_single_bit(static_cast<uint64_t>(steps_[1].value)) && steps_[1].value > 0 &&
             steps_[2].code == Code::kMod && steps_[3].code == Code::kPush && steps_[3].value == 0 &&
             steps_[4].code == Code::kEq) {
    form_ = Form::kStrideDivisible;
    tensor_ = steps_[0].tensor;
    symbol_ = steps_[0].dimension;
    constant_ = steps_[1].value - 1;
  } else if (steps_.size() == 5 && steps_[2].code == Code::kAdd && steps_[4].code == Code::kDiv &&
             steps_[3].code == Code::kPush && steps_[3].value > 0) {
    // (symbol + (c - 1)) // c, with the sum in either order
    const Step& left = steps_[0].code == Code::kPush ? steps_[1] : steps_[0];
    const Step& right = steps_[0].code == Code::kPush ? steps_[0] : steps_[1];
    const bool is_integer = left.code == Code::kInteger;
    if ((left.code == Code::kSymbol || is_integer) && right.code == Code::kPush && right.value == steps_[3].value - 1) {
      form_ = is_integer ? Form::kIntegerCeilDiv : Form::kCeilDiv;
      symbol_ = left.dimension;
      tensor_ = left.tensor;
      constant_ = steps_[3].value;
    }
  } else if (steps_.size() == 1 && steps_[0].code == Code::kInteger) {
    form_ = Form::kInteger;
    tensor_ = steps_[0].tensor;
  } else if (steps_.size() == 7 && steps_[0].code == Code::kInteger && steps_[1].code == Code::kPush &&
             steps_[2].code == Code::kGe && steps_[3].code == Code::kInteger && steps_[3].tensor == steps_[0].tensor &&
             steps_[4].code == Code::kPush && steps_[5].code == Code::kLe && steps_[6].code == Code::kAnd) {
    form_ = Form::kIntegerWithin;
    tensor_ = steps_[0].tensor;
    constant_ = steps_[1].value;
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

/// The forms of one integer argument.
bool Expr::evaluate_integer(int64_t integer, int64_t& value) const noexcept {
  if (form_ == Form::kInteger) {
    value = integer;
  } else if (form_ == Form::kIntegerWithin) {
    value = integer >= constant_ && integer <= most_;
  } else {
    int64_t sum = 0;  // it may be negative
    if (__builtin_add_overflow(integer, constant_ - 1, &sum)) return false;
    value = sum / constant_ - (sum % constant_ < 0);
  }
  return true;
}

bool Expr::evaluate_code(const Call& call, int64_t& value) const noexcept {
  if (HD_UNLIKELY(form_ != Form::kCode)) return evaluate_integer(call.integers[tensor_], value);
  int64_t stack[kMaxDepth];
  int64_t* top = stack;
  for (const Step& step : steps_) {
    switch (step.code) {
      case Code::kPush:
        *top++ = step.value;
        break;
      case Code::kSymbol:
        *top++ = call.sizes[step.dimension];
        break;
      case Code::kSize:
        *top++ = call.tensors[step.tensor].sizes[step.dimension];
        break;
      case Code::kStride:
        *top++ = call.tensors[step.tensor].strides[step.dimension];
        break;
      case Code::kInteger:
        *top++ = call.integers[step.tensor];
        break;
      default:
        if (!apply(step.code, top[-2], top[-1], top[-2])) return false;
        --top;
    }
  }
  value = stack[0];
  return true;
}

}  // namespace hdispatch
