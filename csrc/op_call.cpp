// op_call.cpp -- the hot door of an op: its Python object's vectorcall; what both doors do about a miss.
#include "op_call.h"

#include <c10/core/GradMode.h>
#include <c10/core/InferenceMode.h>

#include <cxxabi.h>
#include <structmember.h>

#include <cstddef>

#include "op_arguments.h"
#include "profiler.h"
#include "python_errors.h"
#include "strict_mode.h"
#include "tensor_view.h"
#include "torch_op.h"
#include "torch_python.h"

namespace hdispatch {

namespace {

// ---- the vectorcall door ----

/// 0: a plain tensor, put into `call`; 1: needs the torch door.
inline int take_tensor(PyObject* object, const ArgSpec& arg, TensorView& view, bool& grad) {
  if (HD_UNLIKELY(!is_exact_tensor_type(Py_TYPE(object)))) {
    // After the check of the type, which is what nearly every argument passes.
    if (object == Py_None) {
      view.dtype = DType::kNone;
      return 0;
    }
    return 1;
  }
  const at::Tensor& tensor = tensor_of(object);
  c10::TensorImpl* impl = tensor.unsafeGetTensorImpl();
  // A tensor on any device but CPU and CUDA (meta, …) has a key that is not plain.
  if (HD_UNLIKELY(!is_plain(impl->key_set()))) return 1;
  // Collected, not tested: whether grad mode is on is asked once, and only if some tensor requires grad.
  grad |= impl->requires_grad();
  view_of(tensor, arg.is_mutated, view);
  return 0;
}

HD_COLD double take_number(const Op& op, const ArgSpec& arg, PyObject* object) {
  if (PyLong_Check(object) && !PyBool_Check(object)) {
    // As torch takes ints for floats.
    const double value = PyLong_AsDouble(object);
    if (value == -1.0 && PyErr_Occurred()) {
      PyErr_Clear();
      fail(Fault::kCaller, op.name(), ": ", arg.name, " is an int that no float holds");
    }
    return value;
  }
  fail(Fault::kCaller, op.name(), ": ", arg.name, " is a ", Py_TYPE(object)->tp_name, "; it takes a float");
}

/// None, or a list or tuple of ints: what torch takes for int[]?.
bool is_integers(PyObject* object) noexcept {
  if (object == Py_None) return true;
  if (!PyList_Check(object) && !PyTuple_Check(object)) return false;
  for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(object); ++i)
    if (!PyLong_Check(PySequence_Fast_GET_ITEM(object, i))) return false;
  return true;
}

/// An integer, a flag, or whether an argument that is served as None only is given.
int64_t take_integer(const Op& op, const ArgSpec& arg, PyObject* object) {
  if (arg.kind == ArgKind::kNone) {
    if (arg.is_ignored && HD_UNLIKELY(!is_integers(object)))
      fail(Fault::kCaller, op.name(), ": ", arg.name, " is a ", Py_TYPE(object)->tp_name, "; it takes ints or None");
    return object != Py_None;
  }
  if (HD_LIKELY(PyBool_Check(object)) && arg.kind == ArgKind::kBool) return object == Py_True;
  if (HD_LIKELY(arg.kind == ArgKind::kInteger && PyLong_Check(object) && !PyBool_Check(object))) {
    int overflow = 0;
    const long long value = PyLong_AsLongLongAndOverflow(object, &overflow);
    if (overflow) fail(Fault::kCaller, op.name(), ": ", arg.name, " is an int that 64 bits do not hold");
    return value;
  }
  fail(Fault::kCaller, op.name(), ": ", arg.name, " is a ", Py_TYPE(object)->tp_name, "; it takes ",
       arg.kind == ArgKind::kBool ? "a bool" : "an int");
}

/// A string: where it is, and its position among the argument's values.
void take_text(const Op& op, const ArgSpec& arg, PyObject* object, Call& call, size_t i) {
  if (HD_UNLIKELY(!PyUnicode_Check(object)))
    fail(Fault::kCaller, op.name(), ": ", arg.name, " is a ", Py_TYPE(object)->tp_name, "; it takes a str");
  Py_ssize_t size = 0;
  const char* data = PyUnicode_AsUTF8AndSize(object, &size);  // kept by the string
  if (HD_UNLIKELY(!data)) {
    PyErr_Clear();
    fail(Fault::kCaller, op.name(), ": ", arg.name, " is a str with half a character, which UTF-8 does not have");
  }
  call.texts[i] = {data, static_cast<size_t>(size)};
  call.integers[i] = arg.position(call.texts[i]);
}

HD_COLD void refuse_grad(const Op& op, PyObject* const* args, size_t count) {
  for (size_t i = 0; i < count; ++i)
    if (op.args()[i].is_tensor() && args[i] != Py_None && tensor_of(args[i]).requires_grad())
      requires_grad(op, op.args()[i]);
}

/// Hands a call to torch's op, which handles every tensor that is not plain. Refuses arguments that are no tensors.
HD_COLD PyObject* call_torch(const OpObject* self, PyObject* const* args) {
  const Op& op = *self->op;
  for (size_t i = 0; i < op.args().size(); ++i)
    if (op.args()[i].is_tensor() && args[i] != Py_None && !is_tensor_object(args[i]) &&
        !PyObject_HasAttrString(args[i], "__torch_function__"))
      fail(Fault::kCaller, op.name(), ": ", op.args()[i].name, " is a ", Py_TYPE(args[i])->tp_name,
           "; it takes a tensor");
  return PyObject_Vectorcall(self->torch_op, args, op.args().size(), nullptr);
}

/// `args` are all arguments in order, and `call` has them. Inlined into both callers: a call of its own costs 5 ns.
__attribute__((always_inline)) inline PyObject* serve(const OpObject* self, PyObject* const* args, Call& call) {
  const Op& op = *self->op;
  const TableReader reader;
  Dispatch found;
  const Outcome outcome = Runtime::get().dispatch(op, call, current_stream, found, &kGil);
  if (HD_UNLIKELY(!is_done(outcome))) {
    miss(op, call, outcome, found);
    PyObject* result = call_fallback(self, args);
    if (result) fell_back(op, outcome);
    return result;
  }
  for (const uint8_t i : op.mutated())
    // Autograd cannot see what a kernel writes; torch's in-place ops count it too.
    if (args[i] != Py_None) bump_version(tensor_of(args[i]));
  Py_RETURN_NONE;
}

/// The arguments as a profiler takes them.
std::vector<c10::IValue> to_values(const Op& op, PyObject* const* args) {
  std::vector<c10::IValue> values;
  for (size_t i = 0; i < op.args().size(); ++i) {
    if (op.args()[i].is_tensor() && args[i] != Py_None)
      values.emplace_back(tensor_of(args[i]));
    else if (PyFloat_Check(args[i]))
      values.emplace_back(PyFloat_AS_DOUBLE(args[i]));
    else if (PyBool_Check(args[i]))
      values.emplace_back(args[i] == Py_True);
    else if (PyLong_Check(args[i]))
      values.emplace_back(static_cast<int64_t>(PyLong_AsLongLong(args[i])));
    else if (PyUnicode_Check(args[i]))
      values.emplace_back(std::string(PyUnicode_AsUTF8(args[i])));
    else
      values.emplace_back();
  }
  return values;
}

/// With the op's name around it, as torch's dispatcher would have recorded it.
HD_COLD PyObject* serve_profiled(const OpObject* self, PyObject* const* args, Call& call) {
  const ProfiledRange range("hdispatch::" + self->op->name(), [&] { return to_values(*self->op, args); });
  return serve(self, args, call);
}

/// `args` are all arguments in order.
PyObject* call_op(const OpObject* self, PyObject* const* args) {
  Call call;  // deliberately not initialised: every entry that is read is written
  if (HD_UNLIKELY(!no_modes() || !fill_call(*self->op, args, call))) return call_torch(self, args);
  if (HD_UNLIKELY(is_profiled())) return serve_profiled(self, args, call);
  return serve(self, args, call);
}

PyObject* vectorcall(PyObject* callable, PyObject* const* args, size_t flags, PyObject* keyword_names) {
  const auto* self = reinterpret_cast<const OpObject*>(callable);
  const size_t positional = static_cast<size_t>(PyVectorcall_NARGS(flags));
  try {
    // All by position: the caller's own array is read, nothing is copied.
    if (HD_LIKELY(positional == self->op->args().size() && !keyword_names)) return call_op(self, args);
    // The temporary lives until call_op has returned.
    return call_op(self, gather_arguments(*self->op, args, positional, keyword_names).data());
  } catch (abi::__forced_unwind&) {
    throw;
  } catch (...) {
    set_python_error();
    return nullptr;
  }
}

/// pick(M, K=0, N=0, variant=0, second=1) -> index of the manifest's row, or None: the key and the probe alone.
PyObject* pick(PyObject* callable, PyObject* const* args, Py_ssize_t count) {
  const Op& op = *reinterpret_cast<const OpObject*>(callable)->op;
  int64_t given[5] = {0, 0, 0, 0, 1};
  if (count < 1 || count > 5) {
    PyErr_Format(PyExc_TypeError, "%s.pick(M, K=0, N=0, variant=0, second=1) takes 1 to 5 ints, got %zd",
                 op.name().c_str(), count);
    return nullptr;
  }
  for (Py_ssize_t i = 0; i < count; ++i) {
    given[i] = PyLong_AsLongLong(args[i]);
    if (given[i] == -1 && PyErr_Occurred()) return nullptr;
  }
  const Runtime& runtime = Runtime::get();
  const TableReader reader;
  // The first device that has rows of the op: it is told no tensor, which would say which.
  for (DeviceSlot slot = 0; slot < kMaxSlots; ++slot) {
    const DeviceTable* table = runtime.table(slot);
    const OpRows* rows = table ? table->rows_of(op) : nullptr;
    if (!rows) continue;
    if (given[0] < 1 || given[4] < 1 || given[3] < 0 || given[3] > 0xffff || !fits(given[1], given[2])) Py_RETURN_NONE;
    uint32_t bucket = rows->ladder.bucket(given[0]);
    if (rows->second_arg >= 0) bucket = rows->with_second(bucket, given[4]);
    const Key key = make_key(op.id(), static_cast<uint16_t>(given[3]), static_cast<uint32_t>(given[1]),
                             static_cast<uint32_t>(given[2]), static_cast<uint16_t>(bucket));
    const Row* row = table->find(*rows, key);
    if (!row) Py_RETURN_NONE;
    return PyLong_FromUnsignedLong(row->index);
  }
  Py_RETURN_NONE;
}

PyObject* get_name(PyObject* self, void*) {
  return PyUnicode_FromString(reinterpret_cast<OpObject*>(self)->op->name().c_str());
}
PyObject* get_schema(PyObject* self, void*) {
  return PyUnicode_FromString(reinterpret_cast<OpObject*>(self)->op->schema().c_str());
}
PyObject* get_fallback(PyObject* self, void*) { return Py_NewRef(reinterpret_cast<OpObject*>(self)->fallback); }
PyObject* repr(PyObject* self) {
  return PyUnicode_FromFormat("<hdispatch op %s>", reinterpret_cast<OpObject*>(self)->op->schema().c_str());
}

PyObject* get_signature(PyObject* self, void*) { return Py_NewRef(reinterpret_cast<OpObject*>(self)->signature); }
PyObject* get_doc(PyObject* self, void*) { return Py_NewRef(reinterpret_cast<OpObject*>(self)->doc); }

}  // namespace

namespace {

/// Inlined into both callers: their loops are of the hot path.
__attribute__((always_inline)) inline bool read_first(const Op& op, PyObject* const* args, size_t count, Call& call,
                                                      bool& grad) {
  const ArgSpec* specs = op.args().data();
  for (size_t i = 0; i < count; ++i) {
    const ArgSpec& arg = specs[i];
    PyObject* object = args[i];
    if (arg.is_tensor()) {
      if (HD_UNLIKELY(take_tensor(object, arg, call.tensors[i], grad))) return false;
    } else if (arg.kind != ArgKind::kFloat) {
      if (HD_UNLIKELY(arg.kind == ArgKind::kString))
        take_text(op, arg, object, call, i);
      else
        call.integers[i] = take_integer(op, arg, object);
    } else if (HD_LIKELY(PyFloat_Check(object))) {
      call.scalars[i] = PyFloat_AS_DOUBLE(object);
    } else {
      call.scalars[i] = take_number(op, arg, object);
    }
  }
  return true;
}

/// torch.ops.hdispatch.<name>, a new reference.
PyObject* find_torch_op(const std::string& name) {
  PyObject* found = PyImport_ImportModule("torch");
  for (const char* attribute : {"ops", "hdispatch", name.c_str()}) {
    if (!found) throw_python_error();
    Py_SETREF(found, PyObject_GetAttrString(found, attribute));
  }
  if (!found) throw_python_error();
  return found;
}

}  // namespace

bool read_arguments(const Op& op, PyObject* const* args, Call& call, bool& grad) {
  return read_first(op, args, op.args().size(), call, grad);
}

bool fill_call(const Op& op, PyObject* const* args, size_t count, Call& call) {
  bool grad = false;
  if (HD_UNLIKELY(!read_first(op, args, count, call, grad))) return false;
  if (HD_UNLIKELY(grad) && c10::GradMode::is_enabled()) refuse_grad(op, args, count);
  return true;
}

HD_COLD void requires_grad(const Op& op, const ArgSpec& arg) {
  fail(Fault::kCaller, op.name(), ": ", arg.name,
       " requires grad and grad mode is on; the op has no backward: call it under torch.no_grad() or pass ", arg.name,
       ".detach()");
}

HD_COLD void miss(const Op& op, const Call& call, Outcome outcome, const Dispatch& found) {
  // M is 0, and the fallback writes what has no rows: nothing is missing from the table, strict mode or not.
  if (outcome == Outcome::kEmptyOutput) return;
  // Both throw in any mode: a fallback would hide the caller's mistake, or launch after an error of the GPU's.
  if (outcome == Outcome::kBadCall) op.complain(call);
  if (outcome == Outcome::kRefused && is_failure(found.result.status)) Runtime::raise_failure(op, call, found);
  count_miss(op, reason_of(op, call, outcome, found), [&] { return Runtime::describe(op, call, outcome, found); });
}

void fell_back(const Op& op, Outcome outcome) {
  if (outcome == Outcome::kEmptyOutput) op.counters().empty.fetch_add(1, std::memory_order_relaxed);
}

HD_COLD PyObject* call_fallback(const OpObject* self, PyObject* const* args) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const c10::InferenceMode inference;
  PyObject* result = PyObject_Vectorcall(self->fallback, args, self->op->args().size(), nullptr);
  if (!result) return nullptr;
  Py_DECREF(result);
  Py_RETURN_NONE;
}

std::string reason_of(const Op& op, const Call& call, Outcome outcome, const Dispatch& found) {
  // With the argument's name, not its value: one count for an argument, however many values come.
  const std::string reason = Runtime::reason(outcome, found);
  return outcome == Outcome::kUnserved ? reason + ": " + op.unserved_argument(call) : reason;
}

void count_miss(const Op& op, const std::string& reason, const std::function<std::string()>& describe) {
  OpCounters& counters = op.counters();
  {
    // Released before strict mode is asked, which may take the GIL: nobody does that with a ForkMutex held.
    const std::lock_guard lock(OpCounters::mutex);
    ++counters.misses[reason];
  }
  if (strict_mode.holds()) fail(Fault::kMiss, describe());
  counters.fallbacks.fetch_add(1, std::memory_order_relaxed);
}

PyObject* make_op_type() {
  static PyMethodDef methods[] = {
      {"pick", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&pick)), METH_FASTCALL,
       "pick(M, K=0, N=0, variant=0, second=1, /)\n--\n\nIndex of the bundle's row that serves these sizes, or None; "
       "second is the value of the integer argument with a ladder, if the op has one. Launches nothing."},
      {nullptr, nullptr, 0, nullptr}};
  static PyMemberDef members[] = {
      {"__vectorcalloffset__", T_PYSSIZET, offsetof(OpObject, vectorcall), READONLY, nullptr},
      {nullptr, 0, 0, 0, nullptr}};
  static PyGetSetDef getset[] = {
      {"name", get_name, nullptr, "The op's name.", nullptr},
      {"__name__", get_name, nullptr, nullptr, nullptr},
      {"__doc__", get_doc, nullptr, nullptr, nullptr},
      {"__signature__", get_signature, nullptr, "What inspect.signature says.", nullptr},
      {"schema", get_schema, nullptr, "The torch schema, without the namespace.", nullptr},
      {"fallback", get_fallback, nullptr, "What runs on a miss: the op's torch reference.", nullptr},
      {nullptr, nullptr, nullptr, nullptr, nullptr}};
  static PyType_Slot slots[] = {{Py_tp_call, reinterpret_cast<void*>(&PyVectorcall_Call)},
                                {Py_tp_repr, reinterpret_cast<void*>(&repr)},
                                {Py_tp_methods, methods},
                                {Py_tp_members, members},
                                {Py_tp_getset, getset},
                                {0, nullptr}};
  static PyType_Spec spec = {"hdispatch._C.Op", sizeof(OpObject), 0,
                             Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL | Py_TPFLAGS_DISALLOW_INSTANTIATION,
                             slots};
  return PyType_FromSpec(&spec);
}

void set_traced_call(PyObject* type, PyObject* function) {
  auto* made = reinterpret_cast<PyTypeObject*>(type);
  if (PyDict_SetItemString(made->tp_dict, "__call__", function)) throw_python_error();
  PyType_Modified(made);
}

OpObject* make_op(PyObject* type, const Op& op, PyObject* fallback, PyObject* doc, PyObject* signature) {
  OpObject* self = PyObject_New(OpObject, reinterpret_cast<PyTypeObject*>(type));
  if (!self) throw_python_error();
  self->vectorcall = vectorcall;
  self->op = &op;
  self->fallback = Py_NewRef(fallback);
  self->doc = Py_NewRef(doc);
  self->signature = Py_NewRef(signature);
  Py_INCREF(self);  // the dispatcher's kernels keep it for ever
  register_in_torch(self);
  self->torch_op = find_torch_op(op.name());
  return self;
}

}  // namespace hdispatch
