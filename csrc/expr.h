// expr.h -- postfix expressions over a call's sizes and strides: grid dimensions, parameters, guards.
//
// Compiled once from the manifest's tokens (manifest.py lists leaves and operators), then evaluated per call without
// allocation. Arithmetic is on int64 with floor division and modulo; overflow and division by zero make `evaluate`
// return false, which the launcher treats as a failed guard.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "call.h"

namespace hdispatch {

/// One token of the manifest: an integer, a leaf's name or an operator.
using Token = std::variant<int64_t, std::string>;

/// Index of an argument by name, or -1.
using FindArg = std::function<int(std::string_view)>;

class Expr {
 public:
  static constexpr uint32_t kMaxDepth = 16;
  static constexpr size_t kMaxTokens = 1024;

  Expr() = default;
  /// Throws kBundle for an unknown token, an unbalanced expression or one deeper than kMaxDepth
  /// or longer than kMaxTokens.
  Expr(const std::vector<Token>& tokens, const FindArg& find_tensor, const FindArg& find_integer = nullptr);

  /// The value for this call; false if it has none.
  bool evaluate(const Call& call, int64_t& value) const noexcept {
    // Nearly every parameter, grid dimension and guard has one of these forms.
    switch (form_) {
      case Form::kConst:
        value = constant_;
        return true;
      case Form::kSymbol:
        value = call.sizes[symbol_];
        return true;
      case Form::kStride:
        value = call.tensors[tensor_].strides[symbol_];
        return true;
      case Form::kSizeCeilDiv:  // sizes are never negative, so the quotient needs no rounding down
        if (__builtin_add_overflow(call.sizes[symbol_], constant_ - 1, &value)) return false;
        value /= constant_;
        return true;
      case Form::kStrideDivisible:
        value = (call.tensors[tensor_].strides[symbol_] & constant_) == 0;
        return true;
      case Form::kCode:
        return evaluate_code(call, value);
      default:
        return evaluate_leaf(call, value);
    }
  }

  bool is_constant() const noexcept { return form_ == Form::kConst; }

  /// Calls visit(tensor, dimension) for every size and stride that the expression reads.
  template <typename Visit>
  void each_tensor(Visit visit) const {
    for (const Step& step : steps_)
      if (step.code == Code::kSize || step.code == Code::kStride) visit(step.tensor, step.dimension);
  }

  /// Calls visit(argument) for every integer argument that the expression reads.
  template <typename Visit>
  void each_integer(Visit visit) const {
    for (const Step& step : steps_)
      if (step.code == Code::kInteger) visit(step.tensor);
  }

 private:
  enum class Form : uint8_t {
    kConst,            ///< constant_
    kSymbol,           ///< a size
    kStride,           ///< a stride
    kSizeCeilDiv,      ///< (size + constant_ - 1) // constant_
    kStrideDivisible,  ///< stride % (constant_ + 1) == 0, a power of two
    kCode,             ///< any other: steps_
    // Of the leaf that is the first step. Not in `evaluate`, whose switch is the faster the fewer cases it has.
    kLeaf,       ///< the leaf
    kCeilDiv,    ///< (leaf + constant_ - 1) // constant_
    kFloorDiv,   ///< leaf // constant_
    kDivisible,  ///< leaf % (constant_ + 1) == 0, a power of two
    kWithin,     ///< constant_ <= leaf <= most_
  };
  enum class Code : uint8_t {
    kPush,
    kSymbol,
    kSize,
    kStride,
    kInteger,  // leaves
    kAdd,
    kSub,
    kMul,
    kDiv,
    kMod,
    kMin,
    kMax,  // arithmetic
    kEq,
    kNe,
    kLt,
    kLe,
    kGt,
    kGe,
    kAnd,
    kOr,  // 0 or 1
  };
  struct Step {
    Code code;
    uint8_t tensor;     ///< kSize, kStride; the argument of kInteger
    uint8_t dimension;  ///< kSize, kStride; the symbol of kSymbol
    int64_t value;      ///< kPush

    bool is(Code other) const noexcept { return code == other; }
    bool is(Code other, int64_t number) const noexcept { return code == other && value == number; }
    bool is_leaf() const noexcept { return code < Code::kAdd && code != Code::kPush; }
  };

  bool evaluate_leaf(const Call& call, int64_t& value) const noexcept;
  bool evaluate_code(const Call& call, int64_t& value) const noexcept;
  static bool apply(Code code, int64_t a, int64_t b, int64_t& out) noexcept;
  static int64_t load(const Step& leaf, const Call& call) noexcept;
  void shorten();
  void shorten_leaf();

  Form form_ = Form::kConst;
  uint8_t symbol_ = 0;  ///< or the dimension of a stride
  uint8_t tensor_ = 0;
  int64_t constant_ = 0;
  int64_t most_ = 0;
  std::vector<Step> steps_;
};

}  // namespace hdispatch
