// sequence_call.cpp -- reading slots, finding plans, foreign steps, and steps made one by one.
#include "sequence_call.h"

#include <ATen/EmptyTensor.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <c10/core/GradMode.h>
#include <c10/core/InferenceMode.h>
#include <c10/util/SmallVector.h>
#include <pthread.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/jit/python/pybind_utils.h>

#include <cxxabi.h>
#include <structmember.h>

#include <algorithm>
#include <cstddef>
#include <exception>
#include <list>

#include "overlap.h"
#include "tensor_view.h"

namespace py = pybind11;

namespace hdispatch {
namespace {

/// Plans that a sequence keeps; one of 324 launches takes some 130 KB.
constexpr size_t kPlans = 64;

c10::ScalarType scalar_type(DType dtype) {
  const auto* found = std::find(kDTypeOf.begin(), kDTypeOf.end(), dtype);
  HD_CHECK(found != kDTypeOf.end() && dtype != DType::kOther, name(dtype));
  return static_cast<c10::ScalarType>(found - kDTypeOf.begin());
}

/// A tensor over memory that another one has, at the view's address.
at::Tensor tensor_at(const at::Tensor& memory, const TensorView& view) {
  const c10::InferenceMode normal(false);
  const c10::TensorImpl* owner = memory.unsafeGetTensorImpl();
  const auto type = view.dtype == DType::kOther ? memory.scalar_type() : scalar_type(view.dtype);
  auto made = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(memory.storage()), owner->key_set(),
                                                       caffe2::TypeMeta::fromScalarType(type));
  const auto base = reinterpret_cast<uintptr_t>(memory.storage().data());
  const auto bytes = static_cast<int64_t>(view.data - base);
  made.unsafeGetTensorImpl()->set_sizes_and_strides(c10::IntArrayRef(view.sizes, view.rank),
                                                    c10::IntArrayRef(view.strides, view.rank),
                                                    bytes / static_cast<int64_t>(c10::elementSize(type)));
  return made;
}

uintptr_t aligned(const at::Tensor& memory) {
  const auto address = reinterpret_cast<uintptr_t>(memory.storage().data());
  return (address + Sequence::kAlignment - 1) / Sequence::kAlignment * Sequence::kAlignment;
}

OpCounters& counters_of(const std::string& name);

}  // namespace

at::Tensor allocate(DeviceSlot device, size_t bytes) {
  const c10::InferenceMode normal(false);
  const c10::Device where = device == kCpuSlot
                                ? c10::Device(c10::DeviceType::CPU)
                                : c10::Device(c10::DeviceType::CUDA, static_cast<c10::DeviceIndex>(device - 1));
  return at::empty({static_cast<int64_t>(bytes + Sequence::kAlignment)},
                   at::TensorOptions().dtype(c10::ScalarType::Byte).device(where));
}

Arena::Arena(at::Tensor memory) : given_(std::move(memory)) {
  if (given_.scalar_type() != c10::ScalarType::Byte || given_.dim() != 1 || !given_.is_contiguous() ||
      given_.storage_offset() != 0)
    fail(Fault::kCaller, "an arena's memory is ", given_.toString(), " of ", given_.dim(), " dimensions, from element ",
         given_.storage_offset(), " of its storage on; it takes all of a contiguous uint8 tensor of one dimension");
}

std::shared_ptr<Arena> make_arena(const py::object& memory) {
  if (memory.is_none()) return std::make_shared<Arena>();
  if (!THPVariable_Check(memory.ptr()))
    fail(Fault::kCaller, "an arena's memory is a ", Py_TYPE(memory.ptr())->tp_name,
         "; it takes a torch.Tensor or None");
  return std::make_shared<Arena>(THPVariable_Unpack(memory.ptr()));
}

const at::Tensor& Arena::get(const Lane& lane, size_t bytes) {
  if (given_.defined()) {
    const DeviceSlot device = given_.is_cpu() ? kCpuSlot : static_cast<DeviceSlot>(given_.device().index() + 1);
    if (device != lane.first)
      fail(Fault::kCaller, "the arena's memory is on ", given_.device().str(), "; the slots are on another device");
    const size_t wanted = bytes + Sequence::kAlignment;
    if (static_cast<size_t>(given_.numel()) < wanted)
      fail(Fault::kCaller, "the arena's memory has ", given_.numel(), " bytes; the sequence takes ", wanted,
           ", arena_bytes and ", Sequence::kAlignment, " to align them");
    return given_;
  }
  std::vector<at::Tensor>& made = made_[lane];
  if (made.empty() || static_cast<size_t>(made.back().numel()) < bytes + Sequence::kAlignment)
    made.push_back(allocate(lane.first, bytes));
  return made.back();
}

size_t Arena::bytes() const {
  size_t total = given_.defined() ? static_cast<size_t>(given_.numel()) : 0;
  for (const auto& [lane, made] : made_)
    for (const at::Tensor& each : made) total += static_cast<size_t>(each.numel());
  return total;
}

namespace {

/// An argument of a step, in the order of the op's schema.
struct Argument {
  enum class Kind : uint8_t { kValue, kTensor, kInteger, kResult };
  Kind kind = Kind::kValue;
  uint32_t index = 0;  ///< kTensor: in SequenceStep::tensors; kInteger: the slot; kResult: the step
  py::object object;   ///< kValue, of an op
  c10::IValue value;   ///< kValue, of a foreign step
  bool is_flag = false;
  bool is_float = false;
};

struct Step {
  const OpObject* op = nullptr;  ///< null: foreign
  std::optional<c10::OperatorHandle> foreign;
  std::vector<Argument> args;
};

/// What a call gives, read.
struct Given {
  c10::SmallVector<TensorView, 16> views;
  c10::SmallVector<int64_t, 16> integers;
  int64_t m = 0;
  DeviceSlot device = kNoSlot;
  CUstream stream = nullptr;
};

class SequenceDoor {
 public:
  SequenceDoor(Sequence sequence, std::vector<Step> steps, std::vector<at::Tensor> constants,
               std::vector<at::Tensor> written, std::shared_ptr<Arena> arena)
      : sequence_(std::move(sequence)),
        steps_(std::move(steps)),
        constants_(std::move(constants)),
        written_(std::move(written)),
        arena_(std::move(arena)),
        counters_(counters_of(sequence_.name())) {
    has_foreign_ = std::any_of(steps_.begin(), steps_.end(), [](const Step& step) { return !step.op; });
  }

  void call(PyObject* const* args);
  std::string explain(PyObject* const* args);
  const Sequence& sequence() const noexcept { return sequence_; }

 private:
  /// The launches of one M on one stream, with what foreign steps are called with.
  struct Plan {
    explicit Plan(const Sequence& sequence) : launches(sequence) {}
    SequencePlan launches;
    int64_t m = 0;
    Arena::Lane lane{};
    std::recursive_mutex* turn = nullptr;  ///< the lane's
    at::Tensor memory;                     ///< the arena
    at::Tensor whole;                      ///< of a call in chunks
    std::vector<uintptr_t> temps;
    std::vector<std::vector<c10::IValue>> stacks;  ///< by run; slots' places are empty
  };

  void read(PyObject* const* args, Given& given) const;
  void check_chunks(const Given& given) const;
  SequenceInputs inputs(const Given& given, const Plan& plan) const {
    return {given.views.data(), given.integers.data(), plan.temps.data(), given.m, given.device};
  }
  std::unique_ptr<Plan> make_plan(const Given& given, const Arena::Lane& lane);
  std::unique_ptr<Plan> take_plan(const Given& given, SequencePlan::Miss& miss, bool& is_served);
  void keep(std::unique_ptr<Plan> plan);
  std::vector<c10::IValue> make_stack(const SequenceRun& run, const Plan& plan, const SequenceInputs& inputs) const;
  void launch(Plan& plan, const Given& given, PyObject* const* args);
  void miss(const SequencePlan::Miss& miss) const;
  void make_one_by_one(Plan& plan, const Given& given, PyObject* const* args);
  at::Tensor tensor(const StepTensor& tensor, const SequenceRun& run, const Plan& plan, const SequenceInputs& inputs,
                    const std::vector<at::Tensor>& slots) const;
  std::vector<at::Tensor> tensors(PyObject* const* args) const;
  void call_foreign(const SequenceRun& run, std::vector<c10::IValue> stack, const Plan& plan,
                    const SequenceInputs& inputs, const std::vector<at::Tensor>& slots,
                    std::vector<at::Tensor>& results) const;
  void bump_versions(PyObject* const* args) const;

  Sequence sequence_;
  std::vector<Step> steps_;
  std::vector<at::Tensor> constants_;  ///< whatever their owners do, this memory stays
  std::vector<at::Tensor> written_;    ///< constants that are written, as they were given
  std::shared_ptr<Arena> arena_;
  OpCounters& counters_;
  bool has_foreign_ = false;
  std::list<std::unique_ptr<Plan>> plans_;  ///< that no call has, the last used one first
};

/// The thread, where there is no stream, or one handle for a stream of each thread (CU_STREAM_PER_THREAD).
Arena::Lane lane_of(const Given& given) {
  const auto stream = reinterpret_cast<uintptr_t>(given.stream);
  constexpr uintptr_t kStreamPerThread = 2;
  const bool is_threads = given.device == kCpuSlot || stream == kStreamPerThread;
  return {given.device, is_threads ? static_cast<uintptr_t>(pthread_self()) : stream};
}

// ---- a call ----

void SequenceDoor::read(PyObject* const* args, Given& given) const {
  const std::vector<SequenceSlot>& slots = sequence_.slots();
  given.views.resize(slots.size());
  given.integers.resize(slots.size());
  bool grad = false;
  const auto where = [&](size_t i) { return text("sequence ", sequence_.name(), ": slot ", slots[i].name, " "); };
  for (size_t i = 0; i < slots.size(); ++i) {
    PyObject* object = args[i];
    given.integers[i] = 0;
    if (!slots[i].is_tensor) {
      if (HD_UNLIKELY(!PyLong_Check(object)))
        fail(Fault::kCaller, where(i), "is a ", Py_TYPE(object)->tp_name, "; it takes an int");
      int overflow = 0;
      given.integers[i] = PyLong_AsLongLongAndOverflow(object, &overflow);
      if (overflow) fail(Fault::kCaller, where(i), "is an int that 64 bits do not hold");
      continue;
    }
    TensorView& view = given.views[i];
    view.dtype = DType::kNone;
    if (object == Py_None) continue;  // Sequence::check says whether it may be
    if (HD_UNLIKELY(!THPVariable_CheckTypeExact(Py_TYPE(object))))
      fail(Fault::kCaller, where(i), "is a ", Py_TYPE(object)->tp_name, "; it takes a torch.Tensor");
    const at::Tensor& tensor = THPVariable_Unpack(object);
    if (HD_UNLIKELY(!is_plain(tensor.unsafeGetTensorImpl()->key_set())))
      fail(Fault::kCaller, where(i), "is no plain CPU or CUDA tensor (it is on ", tensor.device().str(),
           "): a sequence cannot be traced or transformed; call its ops");
    grad |= tensor.requires_grad();
    if (HD_UNLIKELY(grad) && c10::GradMode::is_enabled())
      fail(Fault::kCaller, where(i), "requires grad and grad mode is on; a sequence has no backward: call it under ",
           "torch.no_grad() or pass .detach()");
    view_of(tensor, slots[i].is_written, view);
    if (given.device == kNoSlot && slots[i].has_shape) given.device = view.slot;
  }
  given.m = sequence_.check(given.views.data());
  given.stream = current_stream(given.device);
}

/// In chunks a step writes some rows before the one in front of it has read all: slots must not overlap.
HD_COLD void SequenceDoor::check_chunks(const Given& given) const {
  const std::vector<SequenceSlot>& slots = sequence_.slots();
  const auto is_there = [&](size_t i) {
    return slots[i].is_tensor && given.views[i].dtype != DType::kNone && given.views[i].rank <= kMaxRank;
  };
  for (size_t i = 0; i < slots.size(); ++i)
    for (size_t j = 0; j < slots.size(); ++j) {
      const TensorView &a = given.views[i], &b = given.views[j];
      if (i == j || !slots[i].is_written || !is_there(i) || !is_there(j) || a.storage != b.storage) continue;
      if (!is_same_view(a, b) && overlap(a, b))
        fail(Fault::kCaller, "sequence ", sequence_.name(), ": slot ", slots[i].name,
             " is written and shares memory with slot ", slots[j].name, ", and M = ", given.m,
             " is more than max_rows = ", sequence_.max_rows(),
             ", so that rows are made in chunks; call .clone() on one of them");
    }
}

void SequenceDoor::call(PyObject* const* args) {
  Given given;
  read(args, given);
  if (HD_UNLIKELY(sequence_.is_chunked(given.m))) check_chunks(given);
  const TableReader reader;
  if (HD_UNLIKELY(given.m == 0 || !no_modes())) {  // there is nothing to resolve, or modes want to see every op
    if (given.m == 0) counters_.empty.fetch_add(1, std::memory_order_relaxed);
    make_one_by_one(*make_plan(given, lane_of(given)), given, args);
    return;
  }
  SequencePlan::Miss found;
  bool is_served = false;
  std::unique_ptr<Plan> plan = take_plan(given, found, is_served);
  if (HD_UNLIKELY(!is_served)) {
    miss(found);
    make_one_by_one(*plan, given, args);
    return;
  }
  launch(*plan, given, args);
  keep(std::move(plan));
  bump_versions(args);
  counters_.hits.fetch_add(1, std::memory_order_relaxed);
}

std::unique_ptr<SequenceDoor::Plan> SequenceDoor::make_plan(const Given& given, const Arena::Lane& lane) {
  auto plan = std::make_unique<Plan>(sequence_);
  plan->m = given.m;
  plan->lane = lane;
  plan->turn = &arena_->turn(lane);
  plan->memory = arena_->get(lane, sequence_.arena_bytes());
  if (sequence_.is_chunked(given.m)) plan->whole = allocate(given.device, sequence_.whole_bytes(given.m));
  plan->temps = sequence_.addresses(given.m, aligned(plan->memory), plan->whole.defined() ? aligned(plan->whole) : 0);
  return plan;
}

/// Taken out of the list: a plan is one call's at a time.
std::unique_ptr<SequenceDoor::Plan> SequenceDoor::take_plan(const Given& given, SequencePlan::Miss& miss,
                                                            bool& is_served) {
  const Arena::Lane lane = lane_of(given);
  for (auto at = plans_.begin(); at != plans_.end(); ++at) {
    Plan& each = **at;
    if (each.m != given.m || each.lane != lane) continue;
    const SequencePlan::Update update = each.launches.update(inputs(given, each), miss);
    if (update == SequencePlan::Update::kOther) continue;
    std::unique_ptr<Plan> taken = std::move(*at);
    plans_.erase(at);
    is_served = update == SequencePlan::Update::kReady;
    return taken;
  }
  const DeviceTable* table = Runtime::get().table(given.device);
  const uint64_t generation = table ? table->generation : 0;
  plans_.remove_if(
      [&](const auto& each) { return !each->launches.is_of(generation) && each->lane.first == given.device; });
  std::unique_ptr<Plan> plan = make_plan(given, lane);
  is_served = plan->launches.resolve(inputs(given, *plan), given.stream, miss, &kGil);
  if (!is_served || !has_foreign_) return plan;
  for (const SequenceRun& run : plan->launches.runs())
    plan->stacks.push_back(steps_[run.step].op ? std::vector<c10::IValue>()
                                               : make_stack(run, *plan, inputs(given, *plan)));
  return plan;
}

/// One in chunks has memory of its call alone.
void SequenceDoor::keep(std::unique_ptr<Plan> plan) {
  if (sequence_.is_chunked(plan->m)) return;
  plans_.push_front(std::move(plan));
  if (plans_.size() > kPlans) plans_.pop_back();
}

void SequenceDoor::launch(Plan& plan, const Given& given, PyObject* const* args) {
  const SequenceInputs inputs = this->inputs(given, plan);
  const std::vector<at::Tensor> slots = has_foreign_ ? tensors(args) : std::vector<at::Tensor>();
  std::vector<at::Tensor> results(has_foreign_ ? steps_.size() : 0);
  const SequencePlan::Foreign foreign = [&](size_t run) {
    call_foreign(plan.launches.runs()[run], plan.stacks[run], plan, inputs, slots, results);
  };
  size_t failed = 0;
  LaunchResult result{};
  std::exception_ptr error;
  PyThreadState* const state = PyEval_SaveThread();
  try {
    const std::lock_guard lock(*plan.turn);
    const std::optional<LaunchContext> context =
        plan.launches.table() ? std::optional<LaunchContext>(std::in_place, *plan.launches.table()) : std::nullopt;
    result = plan.launches.launch(foreign, failed);
  } catch (abi::__forced_unwind&) {
    throw;
  } catch (...) {
    error = std::current_exception();
  }
  PyEval_RestoreThread(state);
  if (error) std::rethrow_exception(error);
  if (HD_UNLIKELY(result.status != LaunchStatus::kLaunched)) plan.launches.raise(result, failed);
}

void SequenceDoor::bump_versions(PyObject* const* args) const {
  const std::vector<SequenceSlot>& slots = sequence_.slots();
  for (size_t i = 0; i < slots.size(); ++i)
    if (slots[i].is_written && args[i] != Py_None) bump_version(THPVariable_Unpack(args[i]));
  for (const at::Tensor& each : written_) bump_version(each);
}

// ---- misses ----

/// Counts the miss, and throws in strict mode. Returns if the steps are to be made one by one.
HD_COLD void SequenceDoor::miss(const SequencePlan::Miss& miss) const {
  const std::string where = sequence_.place(miss.step);
  const SequenceStep& step = sequence_.steps()[miss.step];
  if (miss.outcome == Outcome::kEmptyOutput) return;
  if (!miss.view.empty())
    fail(Fault::kCaller, where, "the view that is its argument ", miss.view, " cannot be made of the call's sizes");
  try {
    if (miss.outcome == Outcome::kBadCall) step.op->complain(miss.call);
  } catch (const Error& error) {
    throw Error(error.fault(), where + error.what());
  }
  const std::string reason = step.name + ": " + reason_of(*step.op, miss.call, miss.outcome, miss.found);
  {
    const std::lock_guard lock(OpCounters::mutex);
    ++counters_.misses[reason];
  }
  if (strict_mode.holds()) fail(Fault::kMiss, where, Runtime::describe(*step.op, miss.call, miss.outcome, miss.found));
  counters_.fallbacks.fetch_add(1, std::memory_order_relaxed);
}

/// The tensors of slots; undefined for integers and None.
std::vector<at::Tensor> SequenceDoor::tensors(PyObject* const* args) const {
  std::vector<at::Tensor> found(sequence_.slots().size());
  for (size_t i = 0; i < found.size(); ++i)
    if (sequence_.slots()[i].is_tensor && args[i] != Py_None) found[i] = THPVariable_Unpack(args[i]);
  return found;
}

/// A tensor of a step as torch has it.
at::Tensor SequenceDoor::tensor(const StepTensor& tensor, const SequenceRun& run, const Plan& plan,
                                const SequenceInputs& inputs, const std::vector<at::Tensor>& slots) const {
  if (!tensor.is_temp && tensor.views.empty() && run.rows == inputs.m) return slots[tensor.index];
  TensorView view;
  if (!sequence_.view(tensor, run, inputs, view))
    fail(Fault::kCaller, sequence_.place(run.step), "the view that is argument ", tensor.arg,
         " cannot be made of the call's sizes");
  if (view.dtype == DType::kNone) return {};
  if (!tensor.is_temp) return tensor_at(slots[tensor.index], view);
  const auto begin = reinterpret_cast<uintptr_t>(plan.memory.storage().data());
  const bool is_whole = view.storage < begin || view.storage >= begin + static_cast<uintptr_t>(plan.memory.numel());
  return tensor_at(is_whole ? plan.whole : plan.memory, view);
}

/// A foreign step's arguments, but for what each call gives.
std::vector<c10::IValue> SequenceDoor::make_stack(const SequenceRun& run, const Plan& plan,
                                                  const SequenceInputs& inputs) const {
  std::vector<c10::IValue> stack;
  for (const Argument& arg : steps_[run.step].args) {
    if (arg.kind == Argument::Kind::kTensor) {
      const StepTensor& source = sequence_.steps()[run.step].tensors[arg.index];
      stack.push_back(source.is_temp ? c10::IValue(tensor(source, run, plan, inputs, {})) : c10::IValue());
    } else {
      stack.push_back(arg.value);
    }
  }
  return stack;
}

/// Calls the kernel that torch's dispatcher has for the step, below autograd. With or without the GIL.
void SequenceDoor::call_foreign(const SequenceRun& run, std::vector<c10::IValue> stack, const Plan& plan,
                                const SequenceInputs& inputs, const std::vector<at::Tensor>& slots,
                                std::vector<at::Tensor>& results) const {
  const Step& step = steps_[run.step];
  for (size_t i = 0; i < stack.size(); ++i) {
    const Argument& arg = step.args[i];
    if (arg.kind == Argument::Kind::kTensor) {
      const StepTensor& source = sequence_.steps()[run.step].tensors[arg.index];
      if (source.is_temp) continue;
      at::Tensor found = tensor(source, run, plan, inputs, slots);
      stack[i] = found.defined() ? c10::IValue(std::move(found)) : c10::IValue();
    } else if (arg.kind == Argument::Kind::kResult) {
      stack[i] = results[arg.index];
    } else if (arg.kind == Argument::Kind::kInteger) {
      const int64_t value = inputs.integers[arg.index];
      stack[i] = arg.is_flag    ? c10::IValue(value != 0)
                 : arg.is_float ? c10::IValue(static_cast<double>(value))
                                : c10::IValue(value);
    }
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  try {
    step.foreign->callBoxed(stack);
  } catch (const c10::Error& error) {
    fail(Fault::kFunction, sequence_.place(run.step), error.what_without_backtrace());
  }
  if (stack.size() == 1 && stack[0].isTensor()) results[run.step] = stack[0].toTensor();
}

/// Every step as a call of its own.
HD_COLD void SequenceDoor::make_one_by_one(Plan& plan, const Given& given, PyObject* const* args) {
  std::unique_lock turn(*plan.turn, std::try_to_lock);
  if (!turn) {
    const py::gil_scoped_release released;
    turn.lock();
  }
  const SequenceInputs inputs = this->inputs(given, plan);
  const std::vector<at::Tensor> slots = tensors(args);
  const std::vector<SequenceRun> runs = sequence_.order(given.m);
  std::vector<at::Tensor> results(steps_.size());
  for (const SequenceRun& run : runs) {
    const Step& step = steps_[run.step];
    if (!step.op) {
      call_foreign(run, make_stack(run, plan, inputs), plan, inputs, slots, results);
      continue;
    }
    std::vector<py::object> made;
    std::vector<PyObject*> pointers;
    for (const Argument& arg : step.args) {
      if (arg.kind == Argument::Kind::kValue) {
        made.push_back(arg.object);
      } else if (arg.kind == Argument::Kind::kInteger) {
        made.push_back(py::int_(given.integers[arg.index]));
      } else {
        const at::Tensor found = tensor(sequence_.steps()[run.step].tensors[arg.index], run, plan, inputs, slots);
        made.push_back(found.defined() ? py::reinterpret_steal<py::object>(THPVariable_Wrap(found)) : py::none());
      }
      pointers.push_back(made.back().ptr());
    }
    PyObject* result = PyObject_Vectorcall(reinterpret_cast<PyObject*>(const_cast<OpObject*>(step.op)), pointers.data(),
                                           pointers.size(), nullptr);
    if (!result) throw python_error();
    Py_DECREF(result);
  }
}

std::string SequenceDoor::explain(PyObject* const* args) {
  Given given;
  read(args, given);
  const TableReader reader;
  const std::unique_ptr<Plan> plan = make_plan(given, lane_of(given));
  return hdispatch::explain(sequence_, inputs(given, *plan));
}

// ---- the Python object ----

struct SequenceObject {
  PyObject_HEAD vectorcallfunc vectorcall;
  SequenceDoor* door;  ///< owned
};

/// All slots in order, by position or name; borrowed references.
c10::SmallVector<PyObject*, 16> gather(const Sequence& sequence, PyObject* const* args, size_t positional,
                                       PyObject* keyword_names) {
  const std::vector<SequenceSlot>& slots = sequence.slots();
  if (positional > slots.size())
    fail(Fault::kCaller, "sequence ", sequence.name(), ": got ", positional, " slots; it takes ", slots.size());
  c10::SmallVector<PyObject*, 16> all(slots.size(), nullptr);
  std::copy(args, args + positional, all.begin());
  const Py_ssize_t keywords = keyword_names ? PyTuple_GET_SIZE(keyword_names) : 0;
  for (Py_ssize_t k = 0; k < keywords; ++k) {
    const char* keyword = PyUnicode_AsUTF8(PyTuple_GET_ITEM(keyword_names, k));
    size_t i = 0;
    while (keyword && i < slots.size() && slots[i].name != keyword) ++i;
    if (!keyword || i == slots.size())
      fail(Fault::kCaller, "sequence ", sequence.name(), ": has no slot \"", keyword ? keyword : "?", "\"");
    if (all[i]) fail(Fault::kCaller, "sequence ", sequence.name(), ": slot \"", keyword, "\" is given twice");
    all[i] = args[positional + static_cast<size_t>(k)];
  }
  for (size_t i = 0; i < slots.size(); ++i) {
    if (!all[i] && slots[i].is_optional) all[i] = Py_None;
    if (!all[i]) fail(Fault::kCaller, "sequence ", sequence.name(), ": slot \"", slots[i].name, "\" is missing");
  }
  return all;
}

PyObject* vectorcall(PyObject* callable, PyObject* const* args, size_t flags, PyObject* keyword_names) {
  SequenceDoor& door = *reinterpret_cast<SequenceObject*>(callable)->door;
  const size_t positional = static_cast<size_t>(PyVectorcall_NARGS(flags));
  try {
    if (HD_LIKELY(positional == door.sequence().slots().size() && !keyword_names))
      door.call(args);
    else
      door.call(gather(door.sequence(), args, positional, keyword_names).data());
  } catch (abi::__forced_unwind&) {
    throw;
  } catch (...) {
    set_python_error();
    return nullptr;
  }
  Py_RETURN_NONE;
}

void deallocate(PyObject* self) {
  PyTypeObject* type = Py_TYPE(self);
  delete reinterpret_cast<SequenceObject*>(self)->door;
  PyObject_Free(self);
  Py_DECREF(type);
}

PyObject* get_name(PyObject* self, void*) {
  return PyUnicode_FromString(reinterpret_cast<SequenceObject*>(self)->door->sequence().name().c_str());
}
PyObject* get_arena_bytes(PyObject* self, void*) {
  return PyLong_FromSize_t(reinterpret_cast<SequenceObject*>(self)->door->sequence().arena_bytes());
}
PyObject* repr(PyObject* self) {
  const Sequence& sequence = reinterpret_cast<SequenceObject*>(self)->door->sequence();
  return PyUnicode_FromFormat("<hdispatch sequence %s of %zu steps>", sequence.name().c_str(), sequence.steps().size());
}

/// Never freed, as those of ops: what was counted stays when a sequence goes.
std::map<std::string, OpCounters>& all_counters() {
  static auto* counters = new std::map<std::string, OpCounters>;
  return *counters;
}

OpCounters& counters_of(const std::string& name) { return all_counters()[name]; }

// ---- from a description ----

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

/// What the steps of a sequence become, for the core and for the door.
class StepReader {
 public:
  std::vector<SequenceStep> steps;
  std::vector<Step> door_steps;
  std::vector<at::Tensor> constants;
  std::vector<at::Tensor> written;

  explicit StepReader(const std::string& name) : name_(name) {}

  /// {"name", "op": op or None, "torch": (name, overload) or None, "by_rows", "args": [(kind, …), …]}
  void add(const py::dict& given, const OpObject& (*as_op)(const py::handle&)) {
    SequenceStep step;
    Step door;
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
      throw Error(error.fault(), text("sequence ", name_, ", step ", steps.size(), ": ", error.what()));
    } catch (const py::cast_error& error) {
      fail(Fault::kCaller, "sequence ", name_, ", step ", steps.size(), " (", step.name, "): ", error.what());
    }
    steps.push_back(std::move(step));
    door_steps.push_back(std::move(door));
  }

 private:
  /// ("slot", index, views), ("temp", index, views), ("integer", slot), ("result", step) or ("value", object)
  Argument read(const py::tuple& given, uint32_t at, SequenceStep& step, const Step& door) {
    Argument arg;
    const auto kind = given[0].cast<std::string>();
    if (kind == "value") {
      arg.object = given[1];
      if (!step.op) arg.value = torch::jit::toIValue(given[1], door.foreign->schema().arguments()[at].real_type());
      keep(arg, given[2].cast<bool>());
      return arg;
    }
    arg.index = given[1].cast<uint32_t>();
    if (kind == "integer") {
      arg.kind = Argument::Kind::kInteger;
      step.integers.push_back({at, arg.index});
      if (step.op) return arg;
      const std::string type = door.foreign->schema().arguments()[at].type()->str();
      arg.is_flag = type.starts_with("bool");
      arg.is_float = type.starts_with("float");
    } else if (kind == "result") {
      arg.kind = Argument::Kind::kResult;
    } else {
      StepTensor tensor{at, kind == "temp", arg.index, {}};
      for (const auto& view : given[2].cast<py::list>()) tensor.views.push_back(to_view(view));
      arg.kind = Argument::Kind::kTensor;
      arg.index = static_cast<uint32_t>(step.tensors.size());
      step.tensors.push_back(std::move(tensor));
    }
    return arg;
  }

  /// Memory that a constant had when it was bound stays, whatever its owner does to the tensor.
  void keep(const Argument& arg, bool is_written) {
    if (!THPVariable_Check(arg.object.ptr())) return;
    const at::Tensor& tensor = THPVariable_Unpack(arg.object.ptr());
    constants.push_back(tensor.detach());
    if (is_written) written.push_back(tensor);
  }

  /// The call with all that is the same for every call.
  static void fill(SequenceStep& step, const Step& door) {
    std::vector<PyObject*> objects;
    const py::int_ zero(0);
    for (size_t i = 0; i < door.args.size(); ++i) {
      const Argument& arg = door.args[i];
      objects.push_back(arg.kind == Argument::Kind::kValue     ? arg.object.ptr()
                        : arg.kind == Argument::Kind::kInteger ? zero_of(step.op->args()[i], zero)
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

PyObject* make_sequence(PyObject* type, const std::string& name, const py::list& slots, const py::list& temps,
                        const py::list& steps, int64_t max_rows, std::shared_ptr<Arena> arena,
                        const OpObject& (*as_op)(const py::handle&)) {
  std::vector<SequenceSlot> made_slots;
  for (const auto& item : slots) {
    const auto [slot, dims, dtype, is_tensor, is_written, is_optional] =
        item.cast<std::tuple<std::string, py::object, py::object, bool, bool, bool>>();
    made_slots.push_back({slot, is_tensor, !dims.is_none(), dims.is_none() ? std::vector<RowDim>() : to_dims(dims),
                          to_dtype(dtype), is_written, is_optional});
  }
  std::vector<SequenceTemp> made_temps;
  for (const auto& item : temps) {
    const auto [dims, dtype] = item.cast<std::pair<py::list, py::object>>();
    made_temps.push_back({to_dims(dims), to_dtype(dtype)});
  }
  StepReader reader(name);
  for (const auto& step : steps) reader.add(step.cast<py::dict>(), as_op);
  auto door = std::make_unique<SequenceDoor>(
      Sequence(name, std::move(made_slots), std::move(made_temps), std::move(reader.steps), max_rows),
      std::move(reader.door_steps), std::move(reader.constants), std::move(reader.written), std::move(arena));
  SequenceObject* self = PyObject_New(SequenceObject, reinterpret_cast<PyTypeObject*>(type));
  if (!self) throw python_error();
  self->vectorcall = vectorcall;
  self->door = door.release();
  return reinterpret_cast<PyObject*>(self);
}

std::string explain_sequence(PyObject* sequence, const py::args& args) {
  SequenceDoor& door = *reinterpret_cast<SequenceObject*>(sequence)->door;
  std::vector<PyObject*> given;
  for (const auto& arg : args) given.push_back(arg.ptr());
  return door.explain(gather(door.sequence(), given.data(), given.size(), nullptr).data());
}

std::map<std::string, OpCounters*> sequence_counters() {
  std::map<std::string, OpCounters*> found;
  for (auto& [name, counters] : all_counters()) found[name] = &counters;
  return found;
}

PyObject* make_sequence_type() {
  static PyMemberDef members[] = {
      {"__vectorcalloffset__", T_PYSSIZET, offsetof(SequenceObject, vectorcall), READONLY, nullptr},
      {nullptr, 0, 0, 0, nullptr}};
  static PyGetSetDef getset[] = {
      {"name", get_name, nullptr, "The sequence's name.", nullptr},
      {"arena_bytes", get_arena_bytes, nullptr, "Bytes of temporaries, for max_rows rows.", nullptr},
      {nullptr, nullptr, nullptr, nullptr, nullptr}};
  static PyType_Slot slots[] = {{Py_tp_call, reinterpret_cast<void*>(&PyVectorcall_Call)},
                                {Py_tp_repr, reinterpret_cast<void*>(&repr)},
                                {Py_tp_dealloc, reinterpret_cast<void*>(&deallocate)},
                                {Py_tp_members, members},
                                {Py_tp_getset, getset},
                                {0, nullptr}};
  static PyType_Spec spec = {"hdispatch._C.Sequence", sizeof(SequenceObject), 0,
                             Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL | Py_TPFLAGS_DISALLOW_INSTANTIATION,
                             slots};
  return PyType_FromSpec(&spec);
}

}  // namespace hdispatch
