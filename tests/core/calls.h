// calls.h -- what the core's tests call with: expressions, a toy op, calls of it at made-up addresses.
#pragma once

#include <string>
#include <vector>

#include "expr.h"
#include "op.h"

namespace hdispatch::testing {

/// Tokens as a manifest has them: `tokens("M", 15, "+", 16, "//")`.
template <typename... Items>
std::vector<Token> tokens(const Items&... items) {
  const auto token = [](const auto& item) -> Token {
    if constexpr (std::is_integral_v<std::decay_t<decltype(item)>>)
      return static_cast<int64_t>(item);
    else
      return std::string(item);
  };
  return {token(items)...};
}

/// Tensors of the toy op by name.
inline int toy_tensor(std::string_view name) {
  constexpr std::string_view kNames[] = {"result", "input", "weight", "scale", "", "scale_ub", "residual"};
  for (int i = 0; i < 7; ++i)
    if (!name.empty() && kNames[i] == name) return i;
  return -1;
}

template <typename... Items>
Expr expr(const Items&... items) {
  return Expr(tokens(items...), toy_tensor);
}

/// Arguments of the toy op; indices as in `toy_args`.
enum ToyArg { kResult, kInput, kWeight, kScale, kEpsilon, kScaleUb, kResidual, kToyArgs };

inline Dim symbol(Symbol which, int64_t factor = 1) { return {factor, which, false}; }
inline Dim exactly(int64_t size) { return {size, kSymbols, false}; }
inline Dim any_size() { return {.any = true}; }
inline Dim quotient(Symbol which, int64_t divisor) { return {.symbol = which, .divisor = divisor}; }
inline Dim quotient_by(Symbol which, int argument) { return {.symbol = which, .divisor_arg = argument}; }

inline ArgSpec tensor_arg(std::string name, std::vector<Dim> dims, std::vector<DType> dtypes) {
  ArgSpec arg;
  arg.name = std::move(name);
  arg.dims = std::move(dims);
  arg.dtypes = std::move(dtypes);
  return arg;
}

inline ArgSpec float_arg(std::string name, double minimum) {
  ArgSpec arg;
  arg.name = std::move(name);
  arg.kind = ArgKind::kFloat;
  arg.minimum = minimum;
  return arg;
}

inline ArgSpec int_arg(std::string name, std::vector<int64_t> values, int64_t least = INT64_MIN) {
  ArgSpec arg;
  arg.name = std::move(name);
  arg.kind = ArgKind::kInteger;
  arg.values = std::move(values);
  arg.least = least;
  return arg;
}

inline ArgSpec flag_arg(std::string name, std::vector<int64_t> values) {
  ArgSpec arg = int_arg(std::move(name), std::move(values), 0);
  arg.kind = ArgKind::kBool;
  return arg;
}

inline ArgSpec none_arg(std::string name) {
  ArgSpec arg;
  arg.name = std::move(name);
  arg.kind = ArgKind::kNone;
  return arg;
}

/// result! [M, K], input [M, K] with free rows, weight [K], scale! [M, 1], epsilon >= 0, scale_ub [1]?, residual! [M,
/// K]?
inline std::vector<ArgSpec> toy_args() {
  const std::vector<DType> floats = {DType::kBFloat16, DType::kFloat16};
  std::vector<ArgSpec> args = {
      tensor_arg("result", {symbol(kM), symbol(kK)}, {DType::kFloat8E4M3FN}),
      tensor_arg("input", {symbol(kM), symbol(kK)}, floats),
      tensor_arg("weight", {symbol(kK)}, floats),
      tensor_arg("scale", {symbol(kM), exactly(1)}, {DType::kFloat32}),
      float_arg("epsilon", 0.0),
      tensor_arg("scale_ub", {exactly(1)}, {DType::kFloat32}),
      tensor_arg("residual", {symbol(kM), symbol(kK)}, floats),
  };
  for (const ToyArg i : {kResult, kScale, kResidual}) args[i].is_mutated = true;
  for (const ToyArg i : {kScaleUb, kResidual}) args[i].is_optional = true;
  args[kInput].layout = Layout::kRows;
  return args;
}

inline Signature signature(const std::vector<std::pair<int, DType>>& dtypes) {
  Signature out;
  for (const auto& [index, dtype] : dtypes) out.set(static_cast<uint32_t>(index), static_cast<uint64_t>(dtype));
  return out;
}

/// For bfloat16 and float16, without and with both optional tensors.
inline std::vector<Variant> toy_variants() {
  std::vector<Variant> variants;
  for (const bool full : {false, true})
    for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
      std::vector<std::pair<int, DType>> dtypes = {
          {kResult, DType::kFloat8E4M3FN}, {kInput, dtype}, {kWeight, dtype}, {kScale, DType::kFloat32}};
      if (full) dtypes.insert(dtypes.end(), {{kScaleUb, DType::kFloat32}, {kResidual, dtype}});
      variants.push_back({std::string(name(dtype)) + (full ? "+scale_ub+residual" : ""), signature(dtypes)});
    }
  return variants;
}

/// A contiguous tensor at a made-up address, 4 KiB aligned.
inline TensorView contiguous(uintptr_t page, DType dtype, const std::vector<int64_t>& sizes,
                             DeviceSlot slot = kCpuSlot) {
  TensorView view{};
  view.data = view.storage = page * 4096;
  view.slot = slot;
  view.dtype = dtype;
  view.rank = static_cast<uint32_t>(sizes.size());
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    view.sizes[d] = sizes[d];
    view.strides[d] = stride;
    stride *= sizes[d] > 1 ? sizes[d] : 1;
  }
  return view;
}

inline TensorView absent() {
  TensorView view{};
  view.dtype = DType::kNone;
  return view;
}

/// A valid call of the toy op.
inline Call toy_call(int64_t m, int64_t k, bool full = false, DType dtype = DType::kBFloat16,
                     DeviceSlot slot = kCpuSlot) {
  Call call{};
  call.tensors[kResult] = contiguous(1, DType::kFloat8E4M3FN, {m, k}, slot);
  call.tensors[kInput] = contiguous(2, dtype, {m, k}, slot);
  call.tensors[kWeight] = contiguous(3, dtype, {k}, slot);
  call.tensors[kScale] = contiguous(4, DType::kFloat32, {m, 1}, slot);
  call.tensors[kScaleUb] = full ? contiguous(5, DType::kFloat32, {1}, slot) : absent();
  call.tensors[kResidual] = full ? contiguous(6, dtype, {m, k}, slot) : absent();
  call.scalars[kEpsilon] = 1e-6;
  return call;
}

}  // namespace hdispatch::testing
