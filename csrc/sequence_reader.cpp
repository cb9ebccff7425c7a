// sequence_reader.cpp -- from Python's lists to slots, temporaries and steps.
#include "sequence_reader.h"

#include <tuple>
#include <utility>

#include "torch_python.h"
#include "torch_values.h"

namespace py = pybind11;

namespace hdispatch {
namespace {

RowDim to_dim(const py::handle& given) {
  if (given.is_none()) return {.any = true};
  const auto [per_row, constant] = given.cast<std::pair<int64_t, int64_t>>();
  return {per_row, constant, false};
}

std::vector<RowDim> to_dims(const py::handle& given) {
  std::vector<RowDim> dims;
  for (const auto& dim : given.cast<py::list>()) dims.push_back(to_dim(dim));
  return dims;
}

/// A name that no op takes is a type that is not checked.
DType to_dtype(const py::handle& given) {
  return given.is_none() ? DType::kNone : dtype_named(given.cast<std::string>()).value_or(DType::kOther);
}

/// ("narrow", dimension, start, length), ("view", sizes), ("transpose", dimension, dimension)
ViewStep to_view(const py::handle& item) {
  const auto given = item.cast<py::tuple>();
  const auto kind = given[0].cast<std::string>();
  ViewStep step;
  if (kind == "view") {
    step.kind = ViewStep::Kind::kReshape;
    step.sizes = to_dims(given[1]);
    return step;
  }
  step.first = given[1].cast<uint32_t>();
  if (kind == "transpose") {
    step.kind = ViewStep::Kind::kTranspose;
    step.second = given[2].cast<uint32_t>();
  } else {
    HD_CHECK(kind == "narrow", kind);
    step.start = to_dim(given[2]);
    step.length = to_dim(given[3]);
  }
  return step;
}

class StepReader {
 public:
  SequenceParts parts;

  explicit StepReader(const std::string& name) : name_(name) {}

  /// {"name", "op": op or None, "torch": (name, overload) or None, "by_rows", "args": [(kind, …), …]}
  void add(const py::dict& given, const OpObject& (*as_op)(const py::handle&)) {
    SequenceStep step;
    DoorStep door;
    step.name = given["name"].cast<std::string>();
    step.by_rows = given["by_rows"].cast<bool>();
    const auto args = given["args"].cast<py::list>();
    if (!given["op"].is_none()) {
      door.op = &as_op(given["op"]);
      step.op = door.op->op;
    } else {
      const auto [name, overload] = given["torch"].cast<std::pair<std::string, std::string>>();
      door.foreign = c10::Dispatcher::singleton().findSchemaOrThrow(name.c_str(), overload.c_str());
    }
    try {
      for (uint32_t i = 0; i < args.size(); ++i) door.args.push_back(read(args[i].cast<py::tuple>(), i, step, door));
      if (step.op) fill(step, door);
    } catch (const Error& error) {
      throw Error(error.fault(), text("sequence ", name_, ", step ", parts.steps.size(), ": ", error.what()));
    } catch (const py::cast_error& error) {
      fail(Fault::kCaller, "sequence ", name_, ", step ", parts.steps.size(), " (", step.name, "): ", error.what());
    }
    parts.steps.push_back(std::move(step));
    parts.door_steps.push_back(std::move(door));
  }

 private:
  /// ("slot", index, views), ("temp", index, views), ("integer", slot), ("result", step) or ("value", object)
  SequenceArgument read(const py::tuple& given, uint32_t at, SequenceStep& step, const DoorStep& door) {
    SequenceArgument arg;
    const auto kind = given[0].cast<std::string>();
    if (kind == "value") {
      arg.object = given[1];
      // Converted once, here: the dispatcher's stack takes no Python objects.
      if (!step.op)
        arg.value = torch::jit::toIValue(given[1], door.foreign->schema().arguments()[at].real_type(), std::nullopt);
      keep(arg, given[2].cast<bool>());
      return arg;
    }
    arg.index = given[1].cast<uint32_t>();
    if (kind == "integer") {
      arg.kind = SequenceArgument::Kind::kInteger;
      step.integers.push_back({at, arg.index});
      if (step.op) return arg;
      // A slot gives an int; the dispatcher does not make a flag or a float of it.
      const std::string type = door.foreign->schema().arguments()[at].type()->str();
      arg.is_flag = type.starts_with("bool");
      arg.is_float = type.starts_with("float");
    } else if (kind == "result") {
      arg.kind = SequenceArgument::Kind::kResult;
    } else {
      StepTensor tensor{at, kind == "temp", arg.index, {}};
      for (const auto& view : given[2].cast<py::list>()) tensor.views.push_back(to_view(view));
      arg.kind = SequenceArgument::Kind::kTensor;
      arg.index = static_cast<uint32_t>(step.tensors.size());
      step.tensors.push_back(std::move(tensor));
    }
    return arg;
  }

  /// Memory that a constant had when it was bound stays, whatever its owner does to the tensor.
  void keep(const SequenceArgument& arg, bool is_written) {
    if (!is_tensor_object(arg.object.ptr())) return;
    const at::Tensor& tensor = tensor_of(arg.object.ptr());
    parts.constants.push_back(tensor.detach());
    if (is_written) parts.written.push_back(tensor);
  }

  /// The call with all that is the same for every call.
  static void fill(SequenceStep& step, const DoorStep& door) {
    std::vector<PyObject*> objects;
    const py::int_ zero(0);
    for (size_t i = 0; i < door.args.size(); ++i) {
      const SequenceArgument& arg = door.args[i];
      // What each call gives is absent here, or 0: `make_call` puts it in.
      objects.push_back(arg.kind == SequenceArgument::Kind::kValue     ? arg.object.ptr()
                        : arg.kind == SequenceArgument::Kind::kInteger ? zero_of(step.op->args()[i], zero)
                                                                       : Py_None);
    }
    bool grad = false;
    if (!read_arguments(*step.op, objects.data(), step.call, grad))
      fail(Fault::kCaller, step.name, ": a constant is no plain CPU or CUDA tensor");
  }

  static PyObject* zero_of(const ArgSpec& arg, const py::int_& zero) {
    return arg.kind == ArgKind::kBool ? Py_False : zero.ptr();
  }

  const std::string& name_;  ///< of the sequence
};

}  // namespace

std::vector<SequenceSlot> read_slots(const py::list& given) {
  std::vector<SequenceSlot> made;
  for (const auto& item : given) {
    const auto [name, dims, dtype, is_tensor, is_written, is_optional] =
        item.cast<std::tuple<std::string, py::object, py::object, bool, bool, bool>>();
    made.push_back({name, is_tensor, !dims.is_none(), dims.is_none() ? std::vector<RowDim>() : to_dims(dims),
                    to_dtype(dtype), is_written, is_optional});
  }
  return made;
}

std::vector<SequenceTemp> read_temps(const py::list& given) {
  std::vector<SequenceTemp> made;
  for (const auto& item : given) {
    const auto [dims, dtype] = item.cast<std::pair<py::list, py::object>>();
    made.push_back({to_dims(dims), to_dtype(dtype)});
  }
  return made;
}

SequenceParts read_steps(const std::string& name, const py::list& given, const OpObject& (*as_op)(const py::handle&)) {
  StepReader reader(name);
  for (const auto& step : given) reader.add(step.cast<py::dict>(), as_op);
  return std::move(reader.parts);
}

}  // namespace hdispatch
