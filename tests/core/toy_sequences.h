// toy_sequences.h -- slots and steps of sequences, of the toy op and of functions that are not ours.
#pragma once

#include "calls.h"
#include "sequence.h"

namespace hdispatch::testing {

inline constexpr DType kByte = DType::kFloat8E4M3FN;
inline constexpr int64_t kWidth = 64;
inline const std::vector<int64_t> kEdges = {1, 2, 4, 8, 16};

inline RowDim rows(int64_t factor = 1, int64_t constant = 0) { return {factor, constant, false}; }
inline RowDim fixed(int64_t size) { return {0, size, false}; }

inline SequenceSlot slot(std::string name, std::vector<RowDim> dims, DType dtype, bool written = false) {
  SequenceSlot made;
  made.name = std::move(name);
  made.dims = std::move(dims);
  made.dtype = dtype;
  made.is_written = written;
  return made;
}

inline StepTensor of_slot(uint32_t arg, uint32_t index) { return {arg, false, index, {}}; }
inline StepTensor of_temp(uint32_t arg, uint32_t index) { return {arg, true, index, {}}; }

/// A toy op's step: result, scale and input as given, the weight at a page.
inline SequenceStep toy_step(const Op* op, std::vector<StepTensor> tensors, uintptr_t weight = 100,
                             bool by_rows = true) {
  SequenceStep step;
  step.op = op;
  step.name = "toy";
  step.by_rows = by_rows;
  step.call = toy_call(1, kWidth);
  step.call.tensors[kWeight] = contiguous(weight, DType::kBFloat16, {kWidth});
  step.tensors = std::move(tensors);
  return step;
}

inline std::vector<SequenceSlot> toy_slots() {
  return {slot("result", {rows(), fixed(kWidth)}, kByte, true),
          slot("input", {rows(), fixed(kWidth)}, DType::kBFloat16),
          slot("scale", {rows(), fixed(1)}, DType::kFloat32, true)};
}

inline SequenceStep foreign_step(std::vector<StepTensor> tensors, bool by_rows = false) {
  SequenceStep step;
  step.name = "foreign";
  step.by_rows = by_rows;
  step.tensors = std::move(tensors);
  return step;
}

}  // namespace hdispatch::testing
