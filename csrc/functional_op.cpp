// functional_op.cpp -- sizes of the tensors that an op returns; allocating them; the two doors.
#include "functional_op.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <cxxabi.h>
#include <structmember.h>
#include <torch/library.h>

#include <array>
#include <cstddef>

#include "empty_tensor.h"
#include "op_arguments.h"
#include "profiler.h"
#include "python_errors.h"
#include "tensor_view.h"
#include "torch_python.h"

namespace hdispatch {
namespace {

// ---- sizes and types ----

int64_t size_of(const at::Tensor& tensor, uint32_t d, int64_t) { return tensor.size(d); }
c10::SymInt size_of(const at::Tensor& tensor, uint32_t d, const c10::SymInt&) { return tensor.sym_size(d); }
int64_t count_of(const at::Tensor& tensor, int64_t) { return tensor.numel(); }
c10::SymInt count_of(const at::Tensor& tensor, const c10::SymInt&) { return tensor.sym_numel(); }

/// Dimension `d` of a tensor once it is as the declaration says (`Op::bind`): flattened, merged or padded. False where
/// it cannot be.
template <typename Int>
bool declared_size(const ArgSpec& arg, const at::Tensor& tensor, uint32_t d, Int& out) {
  const auto rank = static_cast<uint32_t>(arg.dims.size());
  const auto has = static_cast<uint32_t>(tensor.dim());
  if (has == rank) {
    out = size_of(tensor, d, out);
  } else if (arg.is_flat) {
    out = count_of(tensor, out);
  } else if (has > rank && arg.is_merged) {
    const uint32_t more = has - rank;
    out = size_of(tensor, d ? d + more : 0, out);
    for (uint32_t i = 1; !d && i <= more; ++i) out = out * size_of(tensor, i, out);
  } else if (has < rank && has >= 2 && arg.is_padded) {
    const uint32_t added = rank - has;
    out = d && d <= added ? Int(1) : size_of(tensor, d ? d - added : 0, out);
  } else {
    return false;
  }
  return true;
}

/// The value of a returned tensor's dimension. False if the tensor that it follows cannot be as declared. `Arguments`
/// gives what a call brought, by index: `tensor`, null if it is none, and `integer`.
template <typename Int, typename Arguments>
bool compute_size(const Op& op, const ReturnedDim& dim, const Arguments& arguments, Int& size) {
  size = Int(1);
  if (dim.argument >= 0) {
    const auto index = static_cast<size_t>(dim.argument);
    const at::Tensor* tensor = arguments.tensor(index);
    if (!tensor || !declared_size(op.args()[index], *tensor, dim.dimension, size)) return false;
    if (dim.unit != 1) size = size / Int(dim.unit);
  }
  if (dim.factor != 1) size = size * Int(dim.factor);
  const int64_t by = dim.divisor_arg < 0 ? dim.divisor : arguments.integer(static_cast<size_t>(dim.divisor_arg));
  if (by < 1) return false;
  if (by != 1) size = (size + Int(by - 1)) / Int(by);
  return true;
}

/// Of a call that cannot be right all are 0: the op then says what is wrong.
template <typename Int, typename Arguments>
void sizes_of(const Op& op, const ReturnedTensor& output, const Arguments& arguments, Int* sizes) {
  for (size_t i = 0; i < output.dims.size(); ++i) {
    if (HD_LIKELY(compute_size(op, output.dims[i], arguments, sizes[i]))) continue;
    std::fill(sizes, sizes + output.dims.size(), Int(0));
    return;
  }
}

template <typename Arguments>
c10::ScalarType type_of(const ReturnedTensor& output, const Arguments& arguments) {
  const at::Tensor* source = output.dtype_of < 0 ? nullptr : arguments.tensor(static_cast<size_t>(output.dtype_of));
  return source ? source->scalar_type() : static_cast<c10::ScalarType>(output.scalar_type);
}

template <typename Arguments>
c10::Device device_of(const FunctionalObject* self, const Arguments& arguments) {
  for (size_t i = 0; i < self->given; ++i) {
    if (!self->out->op->args()[i].is_tensor()) continue;
    if (const at::Tensor* tensor = arguments.tensor(i)) return tensor->device();
  }
  return c10::Device(c10::DeviceType::CPU);
}

// ---- what is returned, from the declaration ----

c10::ScalarType scalar_type_of(DType dtype) {
  for (size_t i = 0; i < kDTypeOf.size(); ++i)
    if (kDTypeOf[i] == dtype) return static_cast<c10::ScalarType>(i);
  fail(Fault::kInternal, "no type of torch's is ", static_cast<int>(dtype));
}

/// The dimension that gives a symbol its value, in an argument that the caller gives.
ReturnedDim find_symbol(const Op& op, size_t given, uint8_t symbol) {
  for (size_t i = 0; i < given; ++i) {
    const ArgSpec& arg = op.args()[i];
    for (uint32_t d = 0; arg.is_tensor() && d < arg.dims.size(); ++d) {
      const Dim& dim = arg.dims[d];
      if (dim.binds && dim.symbol == symbol)
        return {.argument = static_cast<int>(i), .dimension = d, .unit = dim.factor};
    }
  }
  HD_CHECK_BUNDLE(false, op.name(), ": no argument gives ", kSymbolNames[symbol], " its value");
}

ReturnedTensor describe_output(const Op& op, size_t given, const ArgSpec& arg) {
  const ArgSpec* typed = &arg;  // another returned tensor's dtype is that one's
  while (typed->dtype_of >= static_cast<int>(given)) typed = &op.args()[static_cast<size_t>(typed->dtype_of)];
  ReturnedTensor made{{}, static_cast<int8_t>(scalar_type_of(typed->dtypes[0])), typed->dtype_of, arg.is_zeroed};
  for (const Dim& dim : arg.dims) {
    ReturnedDim& out =
        made.dims.emplace_back(dim.symbol < kSymbols ? find_symbol(op, given, dim.symbol) : ReturnedDim{});
    out.factor = dim.factor;
    out.divisor = dim.divisor;
    out.divisor_arg = dim.divisor_arg;
  }
  return made;
}

// ---- allocating ----

template <typename Arguments>
at::Tensor make_output(const FunctionalObject* self, const ReturnedTensor& output, const Arguments& arguments) {
  int64_t sizes[kMaxRank];
  sizes_of(*self->out->op, output, arguments, sizes);
  at::Tensor made = empty_tensor({sizes, output.dims.size()}, type_of(output, arguments), device_of(self, arguments));
  if (HD_LIKELY(!output.is_zeroed)) return made;
  if (PyGILState_Check())
    without_gil([&] { made.zero_(); });  // a launch: the queue may be full
  else
    made.zero_();
  return made;
}

// ---- the vectorcall door ----

struct PythonArguments {
  PyObject* const* given;

  const at::Tensor* tensor(size_t index) const {
    PyObject* object = given[index];
    return object && is_tensor_object(object) ? &tensor_of(object) : nullptr;
  }
  int64_t integer(size_t index) const {
    PyObject* object = given[index];
    const int64_t value = PyLong_Check(object) ? PyLong_AsLongLong(object) : 0;
    if (value == -1 && PyErr_Occurred()) PyErr_Clear();
    return value;
  }
};

/// Whether torch has to see the call first: tensors that are not plain.
bool is_for_torch(const Op& op, PyObject* const* args, size_t given) {
  if (!no_modes()) return true;
  for (size_t i = 0; i < given; ++i) {
    if (!op.args()[i].is_tensor() || args[i] == Py_None) continue;
    if (HD_UNLIKELY(!is_exact_tensor_type(Py_TYPE(args[i])))) {
      if (is_tensor_object(args[i]) || PyObject_HasAttrString(args[i], "__torch_function__")) return true;
      continue;  // no tensor at all: the op refuses it
    }
    if (!is_plain(tensor_of(args[i]).unsafeGetTensorImpl()->key_set())) return true;
  }
  return false;
}

/// The returned tensors as Python objects, owned; only as many entries as there are outputs are touched.
struct Wrapped {
  PyObject* objects[kMaxArgs];
  size_t count = 0;

  ~Wrapped() {
    for (size_t i = 0; i < count; ++i) Py_DECREF(objects[i]);
  }
  PyObject* add(PyObject* object) {
    if (HD_UNLIKELY(!object)) throw_python_error();
    return objects[count++] = object;
  }
  /// What the call returns: the one, or a tuple. Gives them away.
  PyObject* release() {
    if (HD_LIKELY(count == 1)) return objects[--count];
    PyObject* result = PyTuple_New(static_cast<Py_ssize_t>(count));
    if (!result) return nullptr;
    for (size_t i = 0; i < count; ++i) PyTuple_SET_ITEM(result, static_cast<Py_ssize_t>(i), objects[i]);
    count = 0;
    return result;
  }
};

/// A call that gives what is otherwise returned.
PyObject* call_with_outputs(const FunctionalObject* self, PyObject** args) {
  const OpObject* out = self->out;
  const size_t count = out->op->args().size();
  Wrapped wrapped;
  for (size_t i = self->given; i < count; ++i) wrapped.add(Py_NewRef(args[i]));
  PyObject* done = out->vectorcall(const_cast<PyObject*>(reinterpret_cast<const PyObject*>(out)), args, count, nullptr);
  if (HD_UNLIKELY(!done)) return nullptr;
  Py_DECREF(done);
  return wrapped.release();
}

/// Any other call: one for torch, one under a profiler, or a wrong one, which the op refuses.
HD_COLD PyObject* call_otherwise(const FunctionalObject* self, PyObject** args) {
  if (is_for_torch(*self->out->op, args, self->given))
    return PyObject_Vectorcall(self->torch_op, args, self->given, nullptr);
  Wrapped wrapped;
  for (size_t i = 0; i < self->outputs->size(); ++i)
    args[self->given + i] = wrapped.add(wrap_tensor(make_output(self, (*self->outputs)[i], PythonArguments{args})));
  return call_with_outputs(self, args);
}

/// After a miss: the fallback writes the results, unless strict mode forbids it.
HD_COLD PyObject* call_missed(const FunctionalObject* self, PyObject** args, const Call& call, Outcome outcome,
                              const Dispatch& found, c10::ArrayRef<at::Tensor> made) {
  Wrapped wrapped;
  for (size_t i = 0; i < made.size(); ++i) args[self->given + i] = wrapped.add(wrap_tensor(made[i]));
  miss(*self->out->op, call, outcome, found);
  PyObject* done = call_fallback(self->out, args);
  if (!done) return nullptr;
  Py_DECREF(done);
  fell_back(*self->out->op, outcome);
  return wrapped.release();
}

/// Allocates, launches, and only then makes Python objects: the GPU does not wait for them.
PyObject* call_allocating(const FunctionalObject* self, PyObject** args) {
  const Op& op = *self->out->op;
  Call call;  // deliberately not initialised: every entry that is read is written
  if (HD_UNLIKELY(!no_modes() || is_profiled() || !fill_call(op, args, self->given, call)))
    return call_otherwise(self, args);
  c10::SmallVector<at::Tensor, 2> made;
  for (const ReturnedTensor& output : *self->outputs) {
    made.push_back(make_output(self, output, PythonArguments{args}));
    view_of(made.back(), true, call.tensors[self->given + made.size() - 1]);
  }
  const TableReader reader;
  Dispatch found;
  const Outcome outcome = Runtime::get().dispatch(op, call, current_stream, found, &kGil);
  if (HD_UNLIKELY(!is_done(outcome))) return call_missed(self, args, call, outcome, found, made);
  Wrapped wrapped;
  for (at::Tensor& each : made) wrapped.add(wrap_tensor(std::move(each)));
  return wrapped.release();
}

PyObject* call_functional(const FunctionalObject* self, PyObject** args) {
  const Op& op = *self->out->op;
  const bool gives_outputs = args[self->given] != nullptr;
  for (size_t i = self->given; i < op.args().size(); ++i)
    if (HD_UNLIKELY((args[i] != nullptr) != gives_outputs))
      fail(Fault::kCaller, op.name(), ": ", op.args()[i].name, gives_outputs ? " is missing" : " is given",
           "; give all of ", "the tensors that it returns, or none: ", op.schema());
  return gives_outputs ? call_with_outputs(self, args) : call_allocating(self, args);
}

PyObject* functional_vectorcall(PyObject* callable, PyObject* const* args, size_t flags, PyObject* keyword_names) {
  const auto* self = reinterpret_cast<const FunctionalObject*>(callable);
  const size_t positional = static_cast<size_t>(PyVectorcall_NARGS(flags));
  PyObject* all[kMaxArgs];
  try {
    if (HD_LIKELY(positional == self->given && !keyword_names)) {
      std::copy(args, args + positional, all);
      return call_allocating(self, all);
    }
    const std::vector<PyObject*> gathered = gather_arguments(*self->out->op, args, positional, keyword_names);
    for (size_t i = 0; i < gathered.size(); ++i)
      all[i] = i >= self->given && gathered[i] == Py_None ? nullptr : gathered[i];
    return call_functional(self, all);
  } catch (abi::__forced_unwind&) {
    throw;
  } catch (...) {
    set_python_error();
    return nullptr;
  }
}

// ---- the torch door ----

struct StackArguments {
  const c10::IValue* values;

  const at::Tensor* tensor(size_t index) const {
    return values[index].isTensor() && values[index].toTensor().defined() ? &values[index].toTensor() : nullptr;
  }
  int64_t integer(size_t index) const { return values[index].isInt() ? values[index].toInt() : 0; }
};

/// Allocates, and goes on to the op that takes what it returns: below, which checks, refuses gradients and serves.
class FunctionalKernel final : public c10::OperatorKernel {
 public:
  FunctionalKernel(const FunctionalObject* self, c10::OperatorHandle out, bool is_meta)
      : self_(self), out_(std::move(out)), is_meta_(is_meta) {}

  void operator()(const c10::OperatorHandle&, c10::DispatchKeySet, torch::jit::Stack* stack) {
    const StackArguments arguments{stack->data() + (stack->size() - self_->given)};
    std::vector<at::Tensor> made;
    for (const ReturnedTensor& output : *self_->outputs)
      made.push_back(is_meta_ ? make_meta(output, arguments) : make_output(self_, output, arguments));
    for (const at::Tensor& each : made) stack->emplace_back(each);
    out_.callBoxed(stack);
    for (at::Tensor& each : made) stack->emplace_back(std::move(each));
  }

 private:
  /// With sizes that may be symbolic, on the device of the others, which say that they are on meta here.
  at::Tensor make_meta(const ReturnedTensor& output, const StackArguments& arguments) const {
    std::array<c10::SymInt, kMaxRank> sizes;
    sizes_of(*self_->out->op, output, arguments, sizes.data());
    const c10::Device device = device_of(self_, arguments);
    return at::empty_symint(c10::SymIntArrayRef(sizes.data(), output.dims.size()),
                            at::TensorOptions().dtype(type_of(output, arguments)).device(device));
  }

  const FunctionalObject* self_;
  c10::OperatorHandle out_;
  bool is_meta_;
};

void register_in_torch(const FunctionalObject* self) {
  static auto* library = new torch::Library(torch::Library::FRAGMENT, "hdispatch", std::nullopt, __FILE__, __LINE__);
  const std::string& name = self->out->op->name();
  const c10::OperatorHandle out = c10::Dispatcher::singleton().findSchemaOrThrow(("hdispatch::" + name).c_str(), "out");
  for (const auto key : {c10::DispatchKey::CPU, c10::DispatchKey::CUDA, c10::DispatchKey::Meta}) {
    auto kernel = std::make_unique<FunctionalKernel>(self, out, key == c10::DispatchKey::Meta);
    library->impl(name.c_str(), torch::dispatch(key, torch::CppFunction::makeFromBoxedFunctor(std::move(kernel))));
  }
}

PyObject* functional_name(PyObject* self, void*) {
  return PyUnicode_FromString(reinterpret_cast<FunctionalObject*>(self)->out->op->name().c_str());
}
PyObject* functional_schema(PyObject* self, void*) {
  return Py_NewRef(reinterpret_cast<FunctionalObject*>(self)->schema);
}
PyObject* functional_doc(PyObject* self, void*) {
  return Py_NewRef(reinterpret_cast<FunctionalObject*>(self)->out->doc);
}
PyObject* functional_signature(PyObject* self, void*) {
  return Py_NewRef(reinterpret_cast<FunctionalObject*>(self)->out->signature);
}
PyObject* get_out(PyObject* self, void*) {
  return Py_NewRef(
      const_cast<PyObject*>(reinterpret_cast<const PyObject*>(reinterpret_cast<FunctionalObject*>(self)->out)));
}
PyObject* functional_repr(PyObject* self) {
  return PyUnicode_FromFormat("<hdispatch op %U>", reinterpret_cast<FunctionalObject*>(self)->schema);
}

}  // namespace

PyObject* make_functional_type() {
  static PyMemberDef members[] = {
      {"__vectorcalloffset__", T_PYSSIZET, offsetof(FunctionalObject, vectorcall), READONLY, nullptr},
      {nullptr, 0, 0, 0, nullptr}};
  static PyGetSetDef getset[] = {
      {"name", functional_name, nullptr, "The op's name.", nullptr},
      {"__name__", functional_name, nullptr, nullptr, nullptr},
      {"__doc__", functional_doc, nullptr, nullptr, nullptr},
      {"__signature__", functional_signature, nullptr, "What inspect.signature says.", nullptr},
      {"schema", functional_schema, nullptr, "The torch schema, without the namespace.", nullptr},
      {"out", get_out, nullptr, "The op that takes what this one returns.", nullptr},
      {nullptr, nullptr, nullptr, nullptr, nullptr}};
  static PyType_Slot slots[] = {{Py_tp_call, reinterpret_cast<void*>(&PyVectorcall_Call)},
                                {Py_tp_repr, reinterpret_cast<void*>(&functional_repr)},
                                {Py_tp_members, members},
                                {Py_tp_getset, getset},
                                {0, nullptr}};
  static PyType_Spec spec = {"hdispatch._C.FunctionalOp", sizeof(FunctionalObject), 0,
                             Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL | Py_TPFLAGS_DISALLOW_INSTANTIATION,
                             slots};
  return PyType_FromSpec(&spec);
}

FunctionalObject* make_functional(PyObject* type, const OpObject* out, const std::string& schema) {
  const std::vector<ArgSpec>& args = out->op->args();
  size_t given = args.size();
  while (given > 0 && args[given - 1].is_returned) --given;
  HD_CHECK_BUNDLE(given > 0 && given < args.size(), out->op->name(), ": returns ", args.size() - given, " tensors");
  FunctionalObject* self = PyObject_New(FunctionalObject, reinterpret_cast<PyTypeObject*>(type));
  if (!self) throw_python_error();
  self->vectorcall = functional_vectorcall;
  self->out = out;
  self->given = given;
  self->outputs = new std::vector<ReturnedTensor>;
  for (size_t i = given; i < args.size(); ++i) self->outputs->push_back(describe_output(*out->op, given, args[i]));
  self->torch_op = Py_NewRef(out->torch_op);
  self->schema = PyUnicode_FromString(schema.c_str());
  if (!self->schema) throw_python_error();
  Py_INCREF(self);  // the dispatcher's kernels keep it for ever
  register_in_torch(self);
  return self;
}

}  // namespace hdispatch
