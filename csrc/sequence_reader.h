// sequence_reader.h -- the description of a sequence, as hdispatch/sequence.py gives it, read for the core and the
// door.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/ivalue.h>
#include <pybind11/pybind11.h>

#include <optional>
#include <string>
#include <vector>

#include "op_call.h"
#include "sequence.h"

namespace hdispatch {

/// An argument of a step, in the order of the op's schema.
struct SequenceArgument {
  enum class Kind : uint8_t { kValue, kTensor, kInteger, kResult };
  Kind kind = Kind::kValue;
  uint32_t index = 0;       ///< kTensor: in SequenceStep::tensors; kInteger: the slot; kResult: the step
  pybind11::object object;  ///< kValue, of an op
  c10::IValue value;        ///< kValue, of a foreign step
  bool is_flag = false;
  bool is_float = false;
};

/// A step as the door calls it.
struct DoorStep {
  const OpObject* op = nullptr;  ///< null: foreign
  std::optional<c10::OperatorHandle> foreign;
  std::vector<SequenceArgument> args;
};

/// What the steps of a sequence become, for the core and for the door.
struct SequenceParts {
  std::vector<SequenceStep> steps;
  std::vector<DoorStep> door_steps;
  std::vector<at::Tensor> constants;  ///< whatever their owners do, this memory stays
  std::vector<at::Tensor> written;    ///< constants that are written, as they were given
};

/// (name, dims or None, dtype or None, is tensor, is written, is optional), …
std::vector<SequenceSlot> read_slots(const pybind11::list& given);
/// (dims, dtype), …
std::vector<SequenceTemp> read_temps(const pybind11::list& given);
/// {"name", "op": op or None, "torch": (name, overload) or None, "by_rows", "args": [(kind, …), …]}, … of the sequence
/// of that name. `as_op` checks that an object is an op.
SequenceParts read_steps(const std::string& name, const pybind11::list& given,
                         const OpObject& (*as_op)(const pybind11::handle&));

}  // namespace hdispatch
