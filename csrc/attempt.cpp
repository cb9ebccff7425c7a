// attempt.cpp -- the callable that serves a call of an op from the table or says that it did not.
#include "attempt.h"

#include <c10/core/GradMode.h>

#include <cxxabi.h>
#include <structmember.h>

#include <cstddef>
#include <optional>

#include "op_arguments.h"
#include "op_call.h"
#include "profiler.h"
#include "python_errors.h"
#include "tensor_view.h"
#include "torch_python.h"

namespace hdispatch {
namespace {

struct Attempt {
  PyObject_HEAD vectorcallfunc vectorcall;
  const Op* op;
};

/// Counts a call that the table was not asked for. False, as the call is not served.
HD_COLD bool refuse(const Op& op, const std::string& why) {
  count_miss(op, "override: " + why, [&] { return op.name() + ": not served: " + why; });
  return false;
}

HD_COLD bool refuse_wrong(const Op& op, const Call& call) {
  count_miss(op, "override: " + op.reason(call), [&]() -> std::string {
    try {
      op.complain(call);
    } catch (const Error& error) {
      return text(op.name(), ": not served: ", error.what());
    }
  });
  return false;
}

/// A launch that was tried and failed is final: nothing else may serve the call.
HD_COLD bool miss_or_raise(const Op& op, const Call& call, Outcome outcome, const Dispatch& found) {
  if (outcome == Outcome::kRefused && is_failure(found.result.status)) Runtime::raise_failure(op, call, found);
  if (outcome == Outcome::kBadCall) return refuse_wrong(op, call);
  if (outcome == Outcome::kEmptyOutput)
    op.counters().empty.fetch_add(1, std::memory_order_relaxed);
  else
    count_miss(op, reason_of(op, call, outcome, found), [&] { return Runtime::describe(op, call, outcome, found); });
  return false;
}

/// `args` are all arguments in order, and `call` has them.
bool launch(const Op& op, PyObject* const* args, Call& call) {
  std::optional<ProfiledRange> range;
  if (HD_UNLIKELY(is_profiled())) range.emplace("hdispatch::" + op.name());
  const TableReader reader;
  Dispatch found;
  const Outcome outcome = Runtime::get().dispatch(op, call, current_stream, found, &kGil);
  if (HD_UNLIKELY(!is_done(outcome))) return miss_or_raise(op, call, outcome, found);
  for (const uint8_t i : op.mutated())
    if (args[i] != Py_None) bump_version(tensor_of(args[i]));
  return true;
}

/// `args` are all arguments in order.
bool attempt(const Op& op, PyObject* const* args) {
  if (HD_UNLIKELY(!no_modes())) return refuse(op, "a dispatch or function mode is on");
  Call call;  // deliberately not initialised: every entry that is read is written
  bool grad = false;
  bool is_plain = false;
  try {
    is_plain = read_arguments(op, args, call, grad);
  } catch (const Error& error) {
    if (error.fault() != Fault::kCaller) throw;
    return refuse(op, error.what());
  }
  if (HD_UNLIKELY(!is_plain)) return refuse(op, "an argument is not a plain CPU or CUDA tensor");
  if (HD_UNLIKELY(grad) && c10::GradMode::is_enabled()) return refuse(op, "an argument requires grad");
  return launch(op, args, call);
}

PyObject* call_attempt(PyObject* self, PyObject* const* args, size_t flags, PyObject* keyword_names) {
  const Op& op = *reinterpret_cast<const Attempt*>(self)->op;
  const size_t positional = static_cast<size_t>(PyVectorcall_NARGS(flags));
  try {
    if (HD_LIKELY(positional == op.args().size() && !keyword_names)) return PyBool_FromLong(attempt(op, args));
    return PyBool_FromLong(attempt(op, gather_arguments(op, args, positional, keyword_names).data()));
  } catch (abi::__forced_unwind&) {
    throw;
  } catch (...) {
    set_python_error();
    return nullptr;
  }
}

PyTypeObject* attempt_type() {
  static PyMemberDef members[] = {
      {"__vectorcalloffset__", T_PYSSIZET, offsetof(Attempt, vectorcall), READONLY, nullptr},
      {nullptr, 0, 0, 0, nullptr}};
  static PyType_Slot slots[] = {
      {Py_tp_call, reinterpret_cast<void*>(&PyVectorcall_Call)}, {Py_tp_members, members}, {0, nullptr}};
  static PyType_Spec spec = {"hdispatch._C.Attempt", sizeof(Attempt), 0,
                             Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL | Py_TPFLAGS_DISALLOW_INSTANTIATION,
                             slots};
  static PyObject* type = PyType_FromSpec(&spec);
  return reinterpret_cast<PyTypeObject*>(type);
}

}  // namespace

PyObject* make_attempt(const Op& op) {
  PyTypeObject* type = attempt_type();
  Attempt* made = type ? PyObject_New(Attempt, type) : nullptr;
  if (!made) throw_python_error();
  made->vectorcall = call_attempt;
  made->op = &op;
  return reinterpret_cast<PyObject*>(made);
}

}  // namespace hdispatch
