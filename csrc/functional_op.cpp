// functional_op.cpp -- sizes of the tensors that an op returns; allocating them; the two doors.
#include "functional_op.h"

#include <ATen/Functions.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <structmember.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/library.h>

#include <array>
#include <cstddef>

#include "empty_tensor.h"
#include "op_arguments.h"
#include "python_errors.h"
#include "tensor_view.h"

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

/// An argument, for what is computed of it; null if it is no tensor.
using GetTensor = const at::Tensor* (*)(const void* arguments, size_t index);
using GetInteger = int64_t (*)(const void* arguments, size_t index);

struct Arguments {
  const void* given;
  GetTensor tensor;
  GetInteger integer;
};

/// The value of a symbol: the dimension that binds it. False if that tensor cannot be as declared.
template <typename Int>
bool symbol_of(const Op& op, const Arguments& arguments, uint8_t symbol, Int& out) {
  for (size_t i = 0; i < op.args().size(); ++i) {
    const ArgSpec& arg = op.args()[i];
    for (uint32_t d = 0; arg.is_tensor() && d < arg.dims.size(); ++d) {
      const Dim& dim = arg.dims[d];
      if (!dim.binds || dim.symbol != symbol) continue;
      const at::Tensor* tensor = arguments.tensor(arguments.given, i);
      if (!tensor || !declared_size(arg, *tensor, d, out)) return false;
      if (dim.factor != 1) out = out / Int(dim.factor);
      return true;
    }
  }
  return false;
}

template <typename Int>
bool sizes_of(const Op& op, const ArgSpec& arg, const Arguments& arguments, c10::SmallVector<Int, kMaxRank>& sizes) {
  for (const Dim& dim : arg.dims) {
    Int size(1);
    if (dim.symbol < kSymbols && !symbol_of(op, arguments, dim.symbol, size)) return false;
    size = size * Int(dim.factor);
    const int64_t by =
        dim.divisor_arg < 0 ? dim.divisor : arguments.integer(arguments.given, static_cast<size_t>(dim.divisor_arg));
    if (by < 1) return false;
    sizes.push_back(by == 1 ? size : (size + Int(by - 1)) / Int(by));
  }
  return true;
}

c10::ScalarType scalar_type_of(DType dtype) {
  for (size_t i = 0; i < kDTypeOf.size(); ++i)
    if (kDTypeOf[i] == dtype) return static_cast<c10::ScalarType>(i);
  fail(Fault::kInternal, "no type of torch's is ", static_cast<int>(dtype));
}

c10::ScalarType type_of(const ArgSpec& arg, const Arguments& arguments) {
  if (arg.dtype_of >= 0) {
    const at::Tensor* source = arguments.tensor(arguments.given, static_cast<size_t>(arg.dtype_of));
    if (source) return source->scalar_type();
  }
  return scalar_type_of(arg.dtypes[0]);
}

c10::Device device_of(const Op& op, const Arguments& arguments) {
  for (size_t i = 0; i < op.args().size(); ++i) {
    if (!op.args()[i].is_tensor()) continue;
    const at::Tensor* tensor = arguments.tensor(arguments.given, i);
    if (tensor) return tensor->device();
  }
  return c10::Device(c10::DeviceType::CPU);
}

// ---- allocating ----

/// One returned tensor. A call that cannot be right gets one without elements: the op then says what is wrong.
at::Tensor make_output(const Op& op, const ArgSpec& arg, const Arguments& arguments) {
  c10::SmallVector<int64_t, kMaxRank> sizes;
  if (HD_UNLIKELY(!sizes_of(op, arg, arguments, sizes))) sizes.assign(arg.dims.size(), 0);
  at::Tensor made = empty_tensor({sizes.data(), sizes.size()}, type_of(arg, arguments), device_of(op, arguments));
  if (arg.is_zeroed) made.zero_();
  return made;
}

// ---- the vectorcall door ----

const at::Tensor* tensor_in(const void* arguments, size_t index) {
  PyObject* object = static_cast<PyObject* const*>(arguments)[index];
  return object && THPVariable_Check(object) ? &THPVariable_Unpack(object) : nullptr;
}

int64_t integer_in(const void* arguments, size_t index) {
  PyObject* object = static_cast<PyObject* const*>(arguments)[index];
  const int64_t value = PyLong_Check(object) ? PyLong_AsLongLong(object) : 0;
  if (value == -1 && PyErr_Occurred()) PyErr_Clear();
  return value;
}

/// Whether torch has to see the call first: tensors that are not plain.
bool is_for_torch(const Op& op, PyObject* const* args, size_t given) {
  if (!no_modes()) return true;
  for (size_t i = 0; i < given; ++i) {
    if (!op.args()[i].is_tensor() || args[i] == Py_None) continue;
    if (HD_UNLIKELY(!THPVariable_CheckTypeExact(Py_TYPE(args[i])))) {
      if (THPVariable_Check(args[i]) || PyObject_HasAttrString(args[i], "__torch_function__")) return true;
      continue;  // no tensor at all: the op refuses it
    }
    if (!is_plain(THPVariable_Unpack(args[i]).unsafeGetTensorImpl()->key_set())) return true;
  }
  return false;
}

/// The returned tensors as Python objects, owned; only as many entries as there are outputs are touched.
struct Made {
  PyObject* objects[kMaxArgs];
  size_t count = 0;

  ~Made() {
    for (size_t i = 0; i < count; ++i) Py_DECREF(objects[i]);
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

/// `args`: all arguments; those that are returned are there, or null.
PyObject* call_with_outputs(const FunctionalObject* self, PyObject** args) {
  const OpObject* out = self->out;
  const Op& op = *out->op;
  const size_t count = op.args().size();
  const Arguments arguments{args, &tensor_in, &integer_in};
  Made made;
  for (size_t i = self->given; i < count; ++i) {
    PyObject* object = args[i] ? Py_NewRef(args[i]) : THPVariable_Wrap(make_output(op, op.args()[i], arguments));
    if (HD_UNLIKELY(!object)) throw python_error();
    args[i] = made.objects[made.count++] = object;
  }
  PyObject* done = out->vectorcall(const_cast<PyObject*>(reinterpret_cast<const PyObject*>(out)), args, count, nullptr);
  if (HD_UNLIKELY(!done)) return nullptr;
  Py_DECREF(done);
  return made.release();
}

PyObject* call_functional(const FunctionalObject* self, PyObject** args) {
  const Op& op = *self->out->op;
  const bool gives_outputs = args[self->given] != nullptr;
  for (size_t i = self->given; i < op.args().size(); ++i)
    if ((args[i] != nullptr) != gives_outputs)
      fail(Fault::kCaller, op.name(), ": ", op.args()[i].name, gives_outputs ? " is missing" : " is given",
           "; give all of ", "the tensors that it returns, or none: ", op.schema());
  if (HD_UNLIKELY(!gives_outputs && is_for_torch(op, args, self->given)))
    return PyObject_Vectorcall(self->torch_op, args, self->given, nullptr);
  return call_with_outputs(self, args);
}

PyObject* vectorcall(PyObject* callable, PyObject* const* args, size_t flags, PyObject* keyword_names) {
  const auto* self = reinterpret_cast<const FunctionalObject*>(callable);
  const size_t positional = static_cast<size_t>(PyVectorcall_NARGS(flags));
  PyObject* all[kMaxArgs];
  try {
    if (HD_LIKELY(positional == self->given && !keyword_names)) {
      std::copy(args, args + positional, all);
      std::fill(all + positional, all + self->out->op->args().size(), nullptr);
    } else {
      const std::vector<PyObject*> gathered = gather_arguments(*self->out->op, args, positional, keyword_names);
      for (size_t i = 0; i < gathered.size(); ++i)
        all[i] = i >= self->given && gathered[i] == Py_None ? nullptr : gathered[i];
    }
    return call_functional(self, all);
  } catch (...) {
    set_python_error();
    return nullptr;
  }
}

// ---- the torch door ----

const at::Tensor* tensor_on(const void* arguments, size_t index) {
  const auto& [values, given] = *static_cast<const std::pair<const c10::IValue*, size_t>*>(arguments);
  return index < given && values[index].isTensor() && values[index].toTensor().defined() ? &values[index].toTensor()
                                                                                         : nullptr;
}

int64_t integer_on(const void* arguments, size_t index) {
  const auto& [values, given] = *static_cast<const std::pair<const c10::IValue*, size_t>*>(arguments);
  return index < given && values[index].isInt() ? values[index].toInt() : 0;
}

/// Allocates, and goes on to the op that takes what it returns: below, which checks, refuses gradients and serves.
class FunctionalKernel final : public c10::OperatorKernel {
 public:
  FunctionalKernel(const FunctionalObject* self, c10::OperatorHandle out, bool is_meta)
      : self_(self), out_(std::move(out)), is_meta_(is_meta) {}

  void operator()(const c10::OperatorHandle&, c10::DispatchKeySet, torch::jit::Stack* stack) {
    const Op& op = *self_->out->op;
    const std::pair<const c10::IValue*, size_t> given{stack->data() + (stack->size() - self_->given), self_->given};
    const Arguments arguments{&given, &tensor_on, &integer_on};
    std::vector<at::Tensor> made;
    for (size_t i = self_->given; i < op.args().size(); ++i)
      made.push_back(is_meta_ ? make_meta(op.args()[i], arguments) : make_output(op, op.args()[i], arguments));
    for (const at::Tensor& each : made) stack->emplace_back(each);
    out_.callBoxed(stack);
    for (at::Tensor& each : made) stack->emplace_back(std::move(each));
  }

 private:
  /// With sizes that may be symbolic, on the device of the others, which say that they are on meta here.
  at::Tensor make_meta(const ArgSpec& arg, const Arguments& arguments) const {
    const Op& op = *self_->out->op;
    c10::SmallVector<c10::SymInt, kMaxRank> sizes;
    if (!sizes_of(op, arg, arguments, sizes)) sizes.assign(arg.dims.size(), c10::SymInt(0));
    return at::empty_symint(c10::SymIntArrayRef(sizes.data(), sizes.size()),
                            at::TensorOptions().dtype(type_of(arg, arguments)).device(device_of(op, arguments)));
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

PyObject* get_name(PyObject* self, void*) {
  return PyUnicode_FromString(reinterpret_cast<FunctionalObject*>(self)->out->op->name().c_str());
}
PyObject* get_schema(PyObject* self, void*) { return Py_NewRef(reinterpret_cast<FunctionalObject*>(self)->schema); }
PyObject* get_doc(PyObject* self, void*) { return Py_NewRef(reinterpret_cast<FunctionalObject*>(self)->out->doc); }
PyObject* get_signature(PyObject* self, void*) {
  return Py_NewRef(reinterpret_cast<FunctionalObject*>(self)->out->signature);
}
PyObject* get_out(PyObject* self, void*) {
  return Py_NewRef(
      const_cast<PyObject*>(reinterpret_cast<const PyObject*>(reinterpret_cast<FunctionalObject*>(self)->out)));
}
PyObject* repr(PyObject* self) {
  return PyUnicode_FromFormat("<hdispatch op %U>", reinterpret_cast<FunctionalObject*>(self)->schema);
}

}  // namespace

PyObject* make_functional_type() {
  static PyMemberDef members[] = {
      {"__vectorcalloffset__", T_PYSSIZET, offsetof(FunctionalObject, vectorcall), READONLY, nullptr},
      {nullptr, 0, 0, 0, nullptr}};
  static PyGetSetDef getset[] = {{"name", get_name, nullptr, "The op's name.", nullptr},
                                 {"__name__", get_name, nullptr, nullptr, nullptr},
                                 {"__doc__", get_doc, nullptr, nullptr, nullptr},
                                 {"__signature__", get_signature, nullptr, "What inspect.signature says.", nullptr},
                                 {"schema", get_schema, nullptr, "The torch schema, without the namespace.", nullptr},
                                 {"out", get_out, nullptr, "The op that takes what this one returns.", nullptr},
                                 {nullptr, nullptr, nullptr, nullptr, nullptr}};
  static PyType_Slot slots[] = {{Py_tp_call, reinterpret_cast<void*>(&PyVectorcall_Call)},
                                {Py_tp_repr, reinterpret_cast<void*>(&repr)},
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
  if (!self) throw python_error();
  self->vectorcall = vectorcall;
  self->out = out;
  self->given = given;
  self->torch_op = Py_NewRef(out->torch_op);
  self->schema = PyUnicode_FromString(schema.c_str());
  if (!self->schema) throw python_error();
  Py_INCREF(self);  // the dispatcher's kernels keep it for ever
  register_in_torch(self);
  return self;
}

}  // namespace hdispatch
