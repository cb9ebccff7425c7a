// host_program.cpp -- reading and running the programs of grids and heuristics.
#include "host_program.h"

#include <algorithm>
#include <bit>

#include "python_errors.h"
#include "torch_python.h"

namespace hdispatch {

HostSteps::HostSteps(PyObject* listed) {
  int depth = 0;
  for (Py_ssize_t k = 0; k < PyList_GET_SIZE(listed); ++k) {
    int op = 0, b = 0;
    long long a = 0;
    if (!PyArg_ParseTuple(PyList_GET_ITEM(listed, k), "iLi", &op, &a, &b)) throw_python_error();
    const auto code = static_cast<Op>(op);
    depth += code <= Op::kContiguous ? 1 : code == Op::kNextPowerOf2 ? 0 : -1;
    // `compute_steps` has a stack of that depth and does not look.
    HD_CHECK(depth >= 1 && depth <= static_cast<int>(kMaxDepth), depth);
    const bool is_operator = code > Op::kContiguous && code != Op::kNextPowerOf2;
    // `x op constant` is one step and not two: most grids and facts are of such.
    if (is_operator && steps_.back().op == Op::kConst)
      steps_.back() = {code, steps_.back().a, 1};
    else
      steps_.push_back({code, a, is_operator ? 0 : b});
  }
}

HostSteps::HostSteps(PyObject* listed, const HostLayout& layout) : HostSteps(listed) {
  for (Step& step : steps_) place(step, layout);
}

/// What is not there is left as it is: `compute` says so.
void HostSteps::place(Step& step, const HostLayout& layout) const {
  if (step.op < Op::kNumel || step.op > Op::kContiguous) return;
  const auto object = static_cast<size_t>(step.a);
  if (object >= layout.places.size() || !layout.places[object].is_tensor) return;
  const auto [first, rank, is_tensor] = layout.places[object];
  const int64_t dimension = step.b < 0 ? step.b + static_cast<int64_t>(rank) : step.b;
  const bool is_dimension = step.op == Op::kSize || step.op == Op::kStride;
  if (is_dimension && (dimension < 0 || dimension >= static_cast<int64_t>(rank))) return;
  size_t at = first + (step.op == Op::kStride ? rank : 0) + static_cast<size_t>(dimension);
  if (!is_dimension) at = first + 2 * rank + (step.op == Op::kContiguous ? 1 : 0);
  step = {Op::kInteger, static_cast<int64_t>(at), 0};
}

bool HostRange::merge(const HostRange& other) noexcept {
  if (other.integer != integer) return false;
  const auto is_needed = [](const HostRange& range, int64_t value) {
    return value != INT64_MIN && value >= range.least && value <= range.most;
  };
  HostRange both{integer, std::max(least, other.least), std::min(most, other.most), except};
  if (!is_needed(both, both.except)) both.except = other.except;
  if (!is_needed(both, both.except)) both.except = INT64_MIN;
  // A range leaves out one value: two that both matter need two ranges.
  if (is_needed(both, other.except) && other.except != both.except) return false;
  *this = both;
  return true;
}

std::optional<HostRange> HostSteps::as_range() const {
  if (steps_.empty() || steps_[0].op != Op::kInteger || steps_.size() > 2) return std::nullopt;
  HostRange range{static_cast<size_t>(steps_[0].a)};
  if (steps_.size() == 1) {
    range.except = 0;
    return range;
  }
  const Step& step = steps_[1];
  // `a - 1` and `a + 1` below stay within 64 bits.
  if (!step.b || step.a == INT64_MIN || step.a == INT64_MAX) return std::nullopt;
  switch (step.op) {
    case Op::kEq:
      range.least = range.most = step.a;
      return range;
    case Op::kNe:
      range.except = step.a;
      return range;
    case Op::kLt:
      range.most = step.a - 1;
      return range;
    case Op::kLe:
      range.most = step.a;
      return range;
    case Op::kGt:
      range.least = step.a + 1;
      return range;
    case Op::kGe:
      range.least = step.a;
      return range;
    default:
      return std::nullopt;
  }
}

/// Inlined: an operator is a switch in the loop over steps, not a call.
__attribute__((always_inline)) inline bool HostSteps::apply(Op op, int64_t left, int64_t right, int64_t& out) noexcept {
  switch (op) {
    case Op::kAdd:
      if (__builtin_add_overflow(left, right, &out)) return false;
      break;
    case Op::kSub:
      if (__builtin_sub_overflow(left, right, &out)) return false;
      break;
    case Op::kMul:
      if (__builtin_mul_overflow(left, right, &out)) return false;
      break;
    case Op::kDiv:
    case Op::kMod: {  // rounded down; by zero Python raises
      if (right == 0 || (left == INT64_MIN && right == -1)) return false;
      const int64_t rest = left % right;
      const bool down = rest != 0 && (rest < 0) != (right < 0);
      out = op == Op::kDiv ? left / right - down : down ? rest + right : rest;
      break;
    }
    case Op::kMin:
      out = right < left ? right : left;
      break;
    case Op::kMax:
      out = right > left ? right : left;
      break;
    case Op::kEq:
      out = left == right;
      break;
    case Op::kNe:
      out = left != right;
      break;
    case Op::kLt:
      out = left < right;
      break;
    case Op::kLe:
      out = left <= right;
      break;
    case Op::kGt:
      out = left > right;
      break;
    case Op::kGe:
      out = left >= right;
      break;
    case Op::kAnd:
      out = left && right;
      break;
    default:
      out = left || right;
  }
  return true;
}

bool HostSteps::compute_steps(const int64_t* integers, PyObject* const* objects, int64_t& out) const {
  int64_t stack[kMaxDepth];
  size_t top = 0;
  const auto dimension = [objects](const Step& step, bool is_size, int64_t& value) {
    const at::Tensor& tensor = tensor_of(objects[step.a]);
    const c10::IntArrayRef listed = is_size ? tensor.sizes() : tensor.strides();
    const auto rank = static_cast<int64_t>(listed.size());
    const int64_t index = step.b < 0 ? step.b + rank : step.b;
    if (index < 0 || index >= rank) return false;
    value = listed[static_cast<size_t>(index)];
    return true;
  };
  for (const Step& step : steps_) {
    if (step.op <= Op::kContiguous) {
      int64_t& value = stack[top++] = step.a;
      if (step.op == Op::kInteger) value = integers[step.a];
      if (step.op == Op::kNumel) value = tensor_of(objects[step.a]).numel();
      if (step.op == Op::kContiguous) value = tensor_of(objects[step.a]).is_contiguous();
      if ((step.op == Op::kSize || step.op == Op::kStride) && !dimension(step, step.op == Op::kSize, value))
        return false;
      continue;
    }
    if (step.op == Op::kNextPowerOf2) {
      int64_t& value = stack[top - 1];
      if (value < 1 || value > int64_t{1} << 62) return false;  // Python says what it is then
      value = static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(value)));
      continue;
    }
    const int64_t right = step.b ? step.a : stack[--top];
    const int64_t left = stack[top - 1];
    if (!apply(step.op, left, right, stack[top - 1])) return false;
  }
  out = stack[0];
  return true;
}

HostProgram::HostProgram(PyObject* made) {
  PyObject *sources = nullptr, *steps = nullptr, *results = nullptr;
  if (!PyArg_ParseTuple(made, "O!O!O!", &PyList_Type, &sources, &PyList_Type, &steps, &PyList_Type, &results))
    throw_python_error();
  HD_CHECK(static_cast<size_t>(PyList_GET_SIZE(sources)) <= kMaxSources, PyList_GET_SIZE(sources));
  HD_CHECK(PyList_GET_SIZE(steps) == PyList_GET_SIZE(results), PyList_GET_SIZE(results));
  HD_CHECK(static_cast<size_t>(PyList_GET_SIZE(results)) <= kMaxOutputs, PyList_GET_SIZE(results));
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(sources); ++i) {
    int kind = 0, guard = 0, index = 0;
    PyObject *name = nullptr, *object = nullptr;
    if (!PyArg_ParseTuple(PyList_GET_ITEM(sources, i), "iiiOO", &kind, &guard, &index, &name, &object))
      throw_python_error();
    sources_.push_back({static_cast<SourceKind>(kind), static_cast<Guard>(guard), static_cast<uint16_t>(index),
                        Py_NewRef(name), Py_NewRef(object)});
  }
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(results); ++i) {
    int kind = 0;
    PyObject* object = nullptr;
    if (!PyArg_ParseTuple(PyList_GET_ITEM(results, i), "iO", &kind, &object)) throw_python_error();
    outputs_.push_back({static_cast<HostValue::Kind>(kind), Py_NewRef(object), {}});
    outputs_.back().steps = HostSteps(PyList_GET_ITEM(steps, i));
  }
}

HostProgram::~HostProgram() {
  for (Source& each : sources_) {
    Py_DECREF(each.name);
    Py_DECREF(each.object);
  }
  for (Output& each : outputs_) Py_DECREF(each.object);
}

int HostProgram::traverse(visitproc visit, void* arg) const {
  for (const Source& each : sources_) Py_VISIT(each.object);
  for (const Output& each : outputs_) Py_VISIT(each.object);
  return 0;
}

/// Borrowed; null if it is not there.
PyObject* HostProgram::find(const Source& source, const HostInputs& inputs) const {
  switch (source.kind) {
    case SourceKind::kParameter: {
      PyObject* given = inputs.objects[source.index];
      return given || !inputs.constants ? given : PyDict_GetItemWithError(inputs.constants, source.name);
    }
    case SourceKind::kCell: {
      PyObject* closure = PyFunction_GET_CLOSURE(inputs.function);
      if (!closure || source.index >= PyTuple_GET_SIZE(closure)) return nullptr;
      return PyCell_GET(PyTuple_GET_ITEM(closure, source.index));
    }
    case SourceKind::kDefault: {
      PyObject* defaults = PyFunction_GET_DEFAULTS(inputs.function);
      if (!defaults || source.index >= PyTuple_GET_SIZE(defaults)) return nullptr;
      return PyTuple_GET_ITEM(defaults, source.index);
    }
    default:
      return PyDict_GetItemWithError(PyFunction_GET_GLOBALS(inputs.function), source.name);
  }
}

bool HostProgram::run(const HostInputs& inputs, HostValue* out) const {
  PyObject* objects[kMaxSources];
  int64_t integers[kMaxSources];
  size_t count = 0;
  for (const Source& source : sources_) {
    PyObject* object = objects[count] = find(source, inputs);
    int64_t& integer = integers[count++] = 0;
    if (source.guard == Guard::kAbsent) {
      if (object) return false;
      continue;
    }
    if (!object) return false;
    if (source.guard == Guard::kInteger) {
      // Exactly an int: of a bool or a subclass an operator may make something else.
      if (Py_TYPE(object) != &PyLong_Type) return false;
      int overflow = 0;
      integer = PyLong_AsLongLongAndOverflow(object, &overflow);
      if (overflow) return false;
    } else if (source.guard == Guard::kTensor) {
      if (!is_exact_tensor_type(Py_TYPE(object))) return false;
    } else if (object != source.object) {
      // Strings may be equal without being one.
      if (!PyUnicode_CheckExact(object) || !PyUnicode_CheckExact(source.object) ||
          PyUnicode_Compare(object, source.object) != 0)
        return false;
    }
  }
  for (const Output& output : outputs_) {
    *out = {output.kind, 0, output.object};
    if (output.kind != HostValue::Kind::kObject && !output.steps.compute(integers, objects, out->integer)) return false;
    ++out;
  }
  return true;
}

HostPrograms::Known* HostPrograms::find(PyObject* function) {
  PyObject* code = PyFunction_GET_CODE(function);
  PyObject* globals = PyFunction_GET_GLOBALS(function);
  for (const auto& each : known_)
    if (HD_LIKELY(each->code == code && each->globals == globals)) return each.get();
  if (known_.size() >= kMaxCodes) return nullptr;
  known_.push_back(std::make_unique<Known>(Known{Py_NewRef(code), globals, 0, {}}));
  return known_.back().get();
}

HD_COLD const HostProgram* HostPrograms::add(Known& known, PyObject* function, PyObject* trace, PyObject* kernel,
                                             PyObject* arguments) {
  if (!arguments) throw_python_error();
  ++known.attempts;
  // Counted before: a trace that throws is not tried for ever.
  PyObject* made = PyObject_CallFunctionObjArgs(trace, kernel, function, arguments, nullptr);
  Py_DECREF(arguments);
  if (!made) throw_python_error();
  std::unique_ptr<HostProgram> program;
  try {
    if (made != Py_None) program = std::make_unique<HostProgram>(made);
  } catch (...) {
    Py_DECREF(made);
    throw;
  }
  Py_DECREF(made);
  if (!program) return nullptr;
  known.programs.push_back(std::move(program));
  return known.programs.back().get();
}

int HostPrograms::traverse(visitproc visit, void* arg) const {
  for (const auto& each : known_)
    for (const auto& program : each->programs)
      if (const int stopped = program->traverse(visit, arg)) return stopped;
  return 0;
}

void HostPrograms::clear() noexcept {
  for (const auto& each : known_) Py_DECREF(each->code);
  known_.clear();
}

}  // namespace hdispatch
