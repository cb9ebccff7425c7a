// override.cpp -- the kernel over another op's kernel, and the door from Python.
#include "override.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/GradMode.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <cxxabi.h>
#include <structmember.h>

#include <algorithm>
#include <cstddef>

#include "op_arguments.h"
#include "profiler.h"
#include "python_errors.h"
#include "tensor_view.h"
#include "torch_python.h"

namespace hdispatch {
namespace {

bool has_form(const TensorView& view, Form form) noexcept {
  if (view.dtype == DType::kNone || view.rank != 2) return true;  // bind says what is wrong with it
  const int64_t rows = view.sizes[0], columns = view.sizes[1];
  const int64_t down = view.strides[0], right = view.strides[1];
  const bool in_rows = (rows <= 1 || down == columns) && (columns <= 1 || right == 1);
  const bool in_columns = (rows <= 1 || down == 1) && (columns <= 1 || right >= rows);
  switch (form) {
    case Form::kRows:
      return in_rows;
    case Form::kColumns:
      return in_columns;
    case Form::kEither:
      return in_rows || (in_columns && down < right);
    case Form::kPacked:
      return in_columns && (columns <= 1 || right == rows);
  }
  return false;
}

/// The first argument whose form is not the route's; -1 for none.
int misfit(const Route& route, const Call& call) noexcept {
  for (const FormRule& rule : route.rules) {
    const bool by_rows = rule.flag >= 0 && !call.integers[rule.flag];
    if (HD_UNLIKELY(!has_form(call.tensors[rule.arg], by_rows ? Form::kRows : rule.form))) return rule.arg;
  }
  return -1;
}

/// Leaves out the rows that the overridden kernel does not read.
void cut_padding(const Route& route, Call& call) noexcept {
  const TensorView& rows = call.tensors[route.rows];
  for (const uint8_t arg : route.padded) {
    TensorView& view = call.tensors[arg];
    const bool are_there = view.dtype != DType::kNone && rows.dtype != DType::kNone && view.rank && rows.rank;
    if (are_there && view.sizes[0] > rows.sizes[0]) view.sizes[0] = rows.sizes[0];
  }
}

/// What torch says of our kernels when it lists an op's.
constexpr const char* kOurs = "hdispatch";

/// torch warns, once in a process, of a kernel that replaces another. Ours is meant; the warning is left to others.
class NoWarnings final : public c10::WarningHandler {
 public:
  void process(const c10::Warning&) override {}
};

}  // namespace

namespace {

/// A launch that was tried and failed is final: its error is raised, and nothing else may serve the call.
void raise_failure(const Op& op, const Call& call, Outcome outcome, const Dispatch& found) {
  if (HD_UNLIKELY(outcome == Outcome::kRefused && is_failure(found.result.status)))
    Runtime::raise_failure(op, call, found);
}

}  // namespace

/// A call that the table did not serve.
struct Override::Found {
  Call call;
  Dispatch dispatch;
  std::string reason;  ///< why nothing was looked up, if so: an argument and a kind of mismatch
};

/// The kernel below ours.
struct Override::Former {
  c10::SafeKernelFunction kernel;  ///< throws once its library has taken it away
};

/// The boxed kernel. torch owns it.
class Override::Kernel final : public c10::OperatorKernel {
 public:
  explicit Kernel(const Override* self) : self_(self) {}
  void operator()(const c10::OperatorHandle& handle, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
    const Override& self = *self_;
    const bool is_on = self.is_on_.load(std::memory_order_relaxed);
    if (HD_LIKELY(is_on) && HD_LIKELY(self.serve(stack->data() + (stack->size() - self.given_))))
      torch::jit::drop(*stack, self.given_);
    else
      self.former_->kernel.callBoxed(handle, keys, stack);
  }

 private:
  const Override* self_;
};

Override* Override::make(const std::string& name, bool cuda, std::vector<Route> routes, size_t given, size_t required) {
  const c10::DispatchKey key = cuda ? c10::DispatchKey::CUDA : c10::DispatchKey::CPU;
  auto& dispatcher = c10::Dispatcher::singleton();
  const auto handle = dispatcher.findSchema({name, ""});
  if (!handle || !handle->hasKernelForDispatchKey(key)) return nullptr;
  HD_CHECK(handle->schema().arguments().size() == given && given <= kMaxArgs && required <= given, name);
  auto self = std::unique_ptr<Override>(new Override);
  for (const Route& route : routes) {
    std::vector<PyObject*> defaults;
    for (const ArgSpec& arg : route.op->args()) defaults.push_back(default_argument(arg));
    for (size_t i = required; i < defaults.size(); ++i)
      HD_CHECK(defaults[i], name, " does not need ", route.op->args()[i].name, ", and ", route.op->name(), " does");
    self->defaults_.push_back(std::move(defaults));
  }
  self->name_ = name;
  for (const c10::Argument& argument : handle->schema().arguments()) self->names_.push_back(argument.name());
  self->cuda_ = cuda;
  self->routes_ = std::move(routes);
  self->given_ = given;
  self->required_ = required;
  self->former_ = new Former{handle->getComputedKernelForDispatchKey(key)};
  NoWarnings none;
  const c10::WarningUtils::WarningHandlerGuard silence(&none);
  const c10::WarningUtils::WarnAlways leave_the_one_to_others;
  // Its destructor would take the kernel away.
  new c10::RegistrationHandleRAII(dispatcher.registerImpl(
      {name, ""}, key, c10::KernelFunction::makeFromBoxedFunctor(std::make_unique<Kernel>(self.get())), std::nullopt,
      nullptr, kOurs));
  return self.release();
}

bool Override::resume() {
  const c10::DispatchKey key = cuda_ ? c10::DispatchKey::CUDA : c10::DispatchKey::CPU;
  const auto handle = c10::Dispatcher::singleton().findSchema({name_, ""});
  if (!handle || !handle->hasKernelForDispatchKey(key)) return false;
  if (handle->getComputedKernelForDispatchKey(key).debug() != kOurs) return false;
  is_on_.store(true, std::memory_order_relaxed);
  return true;
}

// ---- the torch door ----

Outcome Override::try_route(const Route& route, const c10::IValue* values, Found& found) const {
  const size_t count = route.op->args().size();
  found.reason.clear();
  for (size_t i = count; i < given_; ++i) {
    if (values[i].isNone()) continue;
    found.reason = names_[i] + ": not None";
    return Outcome::kBadCall;
  }
  fill_call(*route.op, values, std::min(count, given_), found.call);
  cut_padding(route, found.call);
  if (const int arg = misfit(route, found.call); HD_UNLIKELY(arg >= 0)) {
    found.reason = route.op->args()[static_cast<size_t>(arg)].name + ": strides that the overridden op does not read";
    return Outcome::kBadCall;
  }
  found.dispatch = {};
  return Runtime::get().dispatch(*route.op, found.call, current_stream, found.dispatch);
}

bool Override::serve(const c10::IValue* values) const {
  const TableReader reader;
  Found found;
  Outcome outcome = Outcome::kBadCall;
  const Route* missed = nullptr;  // the first that took the arguments, if any did
  std::string reasons;            // why the others did not
  for (const Route& route : routes_) {
    outcome = try_route(route, values, found);
    if (HD_LIKELY(is_done(outcome))) {
      bump_versions(*route.op, values);
      return true;
    }
    raise_failure(*route.op, found.call, outcome, found.dispatch);
    if (outcome == Outcome::kBadCall)
      add_reason(route, found, reasons);
    else if (!missed)
      missed = &route;
  }
  const Route& route = missed ? *missed : routes_.front();
  if (&route != &routes_.back()) outcome = try_route(route, values, found);
  raise_failure(*route.op, found.call, outcome, found.dispatch);
  if (HD_UNLIKELY(is_done(outcome))) {  // another table serves by now
    bump_versions(*route.op, values);
    return true;
  }
  miss(route, outcome, found, reasons);
  return false;
}

HD_COLD void Override::add_reason(const Route& route, const Found& found, std::string& reasons) const {
  reasons += (reasons.empty() ? "" : "; ") + (found.reason.empty() ? route.op->reason(found.call) : found.reason);
  if (routes_.size() > 1) reasons += " (" + route.op->name() + ")";
}

HD_COLD void Override::miss(const Route& route, Outcome outcome, const Found& found, const std::string& reasons) const {
  const Op& op = *route.op;
  if (outcome == Outcome::kEmptyOutput) {
    op.counters().empty.fetch_add(1, std::memory_order_relaxed);
    return;
  }
  if (outcome != Outcome::kBadCall)
    return count_miss(op, reason_of(op, found.call, outcome, found.dispatch),
                      [&] { return Runtime::describe(op, found.call, outcome, found.dispatch); });
  count_miss(op, "override: " + reasons, [&]() -> std::string {
    const std::string start = text(name_, " is not served by ", op.name(), ": ");
    if (!found.reason.empty()) return start + found.reason;
    try {
      op.complain(found.call);
    } catch (const Error& error) {
      return start + error.what();
    }
  });
}

// ---- the door from Python ----

struct Override::Door {
  PyObject_HEAD vectorcallfunc vectorcall;
  const Override* self;
  PyObject* otherwise;
};

/// False if torch is to have the call, which then comes to the torch door, if it is one for us at all.
bool Override::serve(PyObject* const* args, size_t count) const {
  if (HD_UNLIKELY(!is_on_.load(std::memory_order_relaxed))) return false;
  if (HD_UNLIKELY(count < required_ || count > given_ || !no_modes())) return false;
  if (HD_UNLIKELY(is_profiled())) return false;  // torch records the op's name and arguments
  for (size_t r = 0; r < routes_.size(); ++r) {
    const Op& op = *routes_[r].op;
    const size_t wanted = op.args().size();
    PyObject* all[kMaxArgs];
    PyObject* const* full = args;
    if (count < wanted) {
      std::copy(args, args + count, all);
      std::copy(defaults_[r].begin() + static_cast<std::ptrdiff_t>(count), defaults_[r].end(), all + count);
      full = all;
    }
    bool is_taken = true;
    for (size_t i = wanted; i < count; ++i) is_taken = is_taken && args[i] == Py_None;
    if (!is_taken) continue;
    Call call;
    bool grad = false;
    if (HD_UNLIKELY(!read_arguments(op, full, call, grad))) return false;
    if (HD_UNLIKELY(grad) && c10::GradMode::is_enabled()) return false;
    cut_padding(routes_[r], call);
    if (HD_UNLIKELY(misfit(routes_[r], call) >= 0)) continue;
    const TensorView& written = call.tensors[op.mutated().front()];
    if (HD_UNLIKELY(written.dtype == DType::kNone || (written.slot == kCpuSlot) == cuda_)) return false;
    const TableReader reader;
    Dispatch found;
    const Outcome outcome = Runtime::get().dispatch(op, call, current_stream, found, &kGil);
    if (HD_UNLIKELY(!is_done(outcome))) {
      raise_failure(op, call, outcome, found);
      continue;
    }
    for (const uint8_t i : op.mutated())
      if (full[i] != Py_None) bump_version(tensor_of(full[i]));
    return true;
  }
  return false;
}

PyObject* Override::call_door(PyObject* door, PyObject* const* args, size_t flags, PyObject* keyword_names) {
  const auto* self = reinterpret_cast<const Door*>(door);
  try {
    if (HD_LIKELY(!keyword_names) && self->self->serve(args, static_cast<size_t>(PyVectorcall_NARGS(flags))))
      Py_RETURN_NONE;
  } catch (abi::__forced_unwind&) {
    throw;
  } catch (const Error& error) {
    if (error.fault() != Fault::kCaller) {  // of a wrong type: torch says so
      set_python_error();
      return nullptr;
    }
  } catch (...) {
    set_python_error();
    return nullptr;
  }
  return PyObject_Vectorcall(self->otherwise, args, flags, keyword_names);
}

PyObject* Override::make_door(PyObject* otherwise) const {
  static PyMemberDef members[] = {{"__vectorcalloffset__", T_PYSSIZET, offsetof(Door, vectorcall), READONLY, nullptr},
                                  {nullptr, 0, 0, 0, nullptr}};
  constexpr auto free = [](PyObject* object) {
    PyTypeObject* type = Py_TYPE(object);
    Py_DECREF(reinterpret_cast<Door*>(object)->otherwise);
    PyObject_Free(object);
    Py_DECREF(type);
  };
  static PyType_Slot slots[] = {{Py_tp_call, reinterpret_cast<void*>(&PyVectorcall_Call)},
                                {Py_tp_members, members},
                                {Py_tp_dealloc, reinterpret_cast<void*>(static_cast<destructor>(free))},
                                {0, nullptr}};
  static PyType_Spec spec = {"hdispatch._C.Door", sizeof(Door), 0,
                             Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL | Py_TPFLAGS_DISALLOW_INSTANTIATION,
                             slots};
  static PyObject* type = PyType_FromSpec(&spec);
  Door* door = type ? PyObject_New(Door, reinterpret_cast<PyTypeObject*>(type)) : nullptr;
  if (!door) throw_python_error();
  door->vectorcall = call_door;
  door->self = this;
  door->otherwise = Py_NewRef(otherwise);
  return reinterpret_cast<PyObject*>(door);
}

}  // namespace hdispatch
