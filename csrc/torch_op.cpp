// torch_op.cpp -- an op in torch's dispatcher: one boxed kernel for every op, on CPU, CUDA, Meta and Autograd keys.
#include "torch_op.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/GradMode.h>
#include <torch/library.h>

#include "python_errors.h"
#include "tensor_view.h"
#include "torch_values.h"

namespace hdispatch {
namespace {

/// A scalar as torch's dispatcher has it.
inline void take_value(const ArgSpec& arg, const c10::IValue& value, Call& call, size_t i) {
  if (arg.kind == ArgKind::kFloat)
    call.scalars[i] = value.toDouble();
  else if (arg.kind == ArgKind::kNone)
    call.integers[i] = !value.isNone();
  else if (HD_UNLIKELY(arg.kind == ArgKind::kString))
    call.integers[i] = arg.position(call.texts[i] = {value.toStringRef().data(), value.toStringRef().size()});
  else
    call.integers[i] = value.isBool() ? value.toBool() : value.toInt();
}

/// One op in torch's dispatcher, for one dispatch key. torch owns it.
class BoxedOp : public c10::OperatorKernel {
 public:
  explicit BoxedOp(const OpObject* self) : self_(self) {}

 protected:
  const Op& op() const { return *self_->op; }

  /// Serves the arguments on top of the stack, without popping them.
  void serve(const torch::jit::Stack& stack) const {
    const size_t count = op().args().size();
    const c10::IValue* values = stack.data() + (stack.size() - count);
    Call call;
    fill_call(op(), values, count, call);
    const TableReader reader;
    Dispatch found;
    const Outcome outcome = Runtime::get().dispatch(op(), call, current_stream, found);
    if (HD_UNLIKELY(!is_done(outcome))) {
      miss(op(), call, outcome, found);
      fall_back(values);
      fell_back(op(), outcome);
      return;
    }
    bump_versions(op(), values);
  }

  const OpObject* self_;

 private:
  HD_COLD void fall_back(const c10::IValue* values) const {
    const pybind11::gil_scoped_acquire gil;
    std::vector<pybind11::object> args;
    std::vector<PyObject*> pointers;
    for (size_t i = 0; i < op().args().size(); ++i) {
      args.push_back(pybind11::reinterpret_steal<pybind11::object>(torch::jit::toPyObject(values[i]).release()));
      pointers.push_back(args.back().ptr());
    }
    PyObject* result = call_fallback(self_, pointers.data());
    if (!result) throw_python_error();
    Py_DECREF(result);
  }
};

class BackendKernel final : public BoxedOp {
 public:
  using BoxedOp::BoxedOp;
  void operator()(const c10::OperatorHandle&, c10::DispatchKeySet, torch::jit::Stack* stack) {
    serve(*stack);
    torch::jit::drop(*stack, op().args().size());
  }
};

/// Refuses tensors that require grad; otherwise torch goes on below autograd.
class AutogradKernel final : public BoxedOp {
 public:
  using BoxedOp::BoxedOp;
  void operator()(const c10::OperatorHandle& handle, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
    const size_t count = op().args().size();
    if (c10::GradMode::is_enabled()) {
      for (size_t i = 0; i < count; ++i) {
        const c10::IValue& value = (*stack)[stack->size() - count + i];
        if (value.isTensor() && value.toTensor().defined() && value.toTensor().requires_grad())
          requires_grad(op(), op().args()[i]);
      }
    }
    const c10::DispatchKeySet below = keys & c10::after_autograd_keyset;
    const c10::DispatchKey next = below.highestPriorityTypeId();
    if (HD_LIKELY(next == c10::DispatchKey::CUDA || next == c10::DispatchKey::CPU)) {
      serve(*stack);  // one trip through the dispatcher less
      torch::jit::drop(*stack, count);
    } else {
      handle.redispatchBoxed(below, stack);
    }
  }
};

/// Shapes of the results are the caller's, so there is nothing to infer; but a wrong call is refused while it is
/// traced.
class MetaKernel final : public BoxedOp {
 public:
  using BoxedOp::BoxedOp;
  void operator()(const c10::OperatorHandle&, c10::DispatchKeySet, torch::jit::Stack* stack) {
    const size_t count = op().args().size();
    check(stack->data() + (stack->size() - count));
    torch::jit::drop(*stack, count);
  }

 private:
  void check(const c10::IValue* values) const {
    Call call;
    bool is_known = true;  // symbolic sizes are not
    for (size_t i = 0; i < op().args().size(); ++i) {
      const ArgSpec& arg = op().args()[i];
      TensorView& view = call.tensors[i];
      if (!arg.is_tensor()) {
        is_known = is_known && !values[i].isSymInt() && !values[i].isSymFloat() && !values[i].isSymBool();
        if (is_known) take_value(arg, values[i], call, i);
      } else if (!values[i].isTensor() || !values[i].toTensor().defined()) {
        view.dtype = DType::kNone;
      } else {
        const at::Tensor& tensor = values[i].toTensor();
        if (!tensor.device().is_meta())  // fake tensors say that they are, here
          fail(Fault::kCaller, op().name(), ": ", arg.name, " is on ", tensor.device().str(),
               "; another argument is a meta tensor; all tensors are on one device");
        is_known = is_known && !tensor.unsafeGetTensorImpl()->has_symbolic_sizes_strides();
        if (is_known) view_shape(tensor, view);
        view.slot = kCpuSlot;
        view.storage = i + 1;  // it has none, so it shares none
      }
    }
    uint16_t variant = 0;
    DeviceSlot slot = kNoSlot;
    if (is_known && op().bind(call, variant, slot) == Bound::kWrong) op().complain(call);
  }
};

template <typename Kernel>
torch::CppFunction boxed(const OpObject* self) {
  return torch::CppFunction::makeFromBoxedFunctor(std::make_unique<Kernel>(self));
}

}  // namespace

void register_in_torch(const OpObject* self) {
  // Never destroyed: the ops live as long as the process.
  static auto* library = new torch::Library(torch::Library::FRAGMENT, "hdispatch", std::nullopt, __FILE__, __LINE__);
  // With its overload, which the schema says: an op that returns tensors takes them as "<op>.out".
  const std::string& schema = self->op->schema();
  const std::string whole = schema.substr(0, schema.find('('));
  const char* name = whole.c_str();
  library->def(self->op->schema().c_str(), {at::Tag::pt2_compliant_tag});
  library->impl(name, torch::dispatch(c10::DispatchKey::CUDA, boxed<BackendKernel>(self)));
  library->impl(name, torch::dispatch(c10::DispatchKey::CPU, boxed<BackendKernel>(self)));
  library->impl(name, torch::dispatch(c10::DispatchKey::Meta, boxed<MetaKernel>(self)));
  library->impl(name, torch::dispatch(c10::DispatchKey::Autograd, boxed<AutogradKernel>(self)));
}

void fill_call(const Op& op, const c10::IValue* values, size_t given, Call& call) {
  const std::vector<ArgSpec>& specs = op.args();
  for (size_t i = 0; i < specs.size(); ++i) {
    const ArgSpec& arg = specs[i];
    if (HD_UNLIKELY(i >= given)) {  // absent
      call.integers[i] = arg.default_value;
      call.tensors[i].dtype = DType::kNone;
      if (arg.kind == ArgKind::kString) {
        const std::string& text = arg.texts[static_cast<size_t>(arg.default_value)];
        call.texts[i] = {text.data(), text.size()};
      }
    } else if (!arg.is_tensor()) {
      take_value(arg, values[i], call, i);
    } else if (values[i].isNone() || !values[i].toTensor().defined()) {
      call.tensors[i].dtype = DType::kNone;
    } else {
      view_of(values[i].toTensor(), arg.is_mutated, call.tensors[i]);
    }
  }
}

void bump_versions(const Op& op, const c10::IValue* values) {
  for (const uint8_t i : op.mutated())
    if (values[i].isTensor() && values[i].toTensor().defined()) bump_version(values[i].toTensor());
}

}  // namespace hdispatch
