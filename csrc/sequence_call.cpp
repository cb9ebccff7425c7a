// sequence_call.cpp -- reading slots, finding plans, foreign steps, and steps made one by one.
#include "sequence_call.h"

#include <ATen/EmptyTensor.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/core/GradMode.h>
#include <c10/core/InferenceMode.h>
#include <c10/util/SmallVector.h>
#include <pthread.h>

#include <cxxabi.h>
#include <structmember.h>

#include <algorithm>
#include <cstddef>
#include <list>

#include "overlap.h"
#include "profiler.h"
#include "python_errors.h"
#include "sequence_plan.h"
#include "sequence_reader.h"
#include "strict_mode.h"
#include "tensor_view.h"
#include "torch_python.h"

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
  // A plan outlives the call: a tensor made in inference mode could not be used outside of it.
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

/// The sequence's name around a call's launches, and each step's name around its own.
class ProfiledSteps final : public SequencePlan::Observer {
 public:
  ProfiledSteps(const Sequence& sequence, const std::vector<SequenceRun>& runs)
      : sequence_(sequence), runs_(runs), all_("hdispatch::sequence " + sequence.name()) {}
  void begin(size_t run) override {
    const SequenceStep& step = sequence_.steps()[runs_[run].step];
    step_.emplace(step.op ? "hdispatch::" + step.op->name() : step.name);
  }
  void end() override { step_.reset(); }

 private:
  const Sequence& sequence_;
  const std::vector<SequenceRun>& runs_;
  ProfiledRange all_;
  std::optional<ProfiledRange> step_;
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
  SequenceDoor(Sequence sequence, std::vector<DoorStep> steps, std::vector<at::Tensor> constants,
               std::vector<at::Tensor> written, std::shared_ptr<Arena> arena)
      : sequence_(std::move(sequence)),
        steps_(std::move(steps)),
        constants_(std::move(constants)),
        written_(std::move(written)),
        arena_(std::move(arena)),
        counters_(counters_of(sequence_.name())) {
    for (size_t i = 0; i < sequence_.slots().size(); ++i)
      if (sequence_.slots()[i].is_written) written_slots_.push_back(i);
    has_foreign_ = std::any_of(steps_.begin(), steps_.end(), [](const DoorStep& step) { return !step.op; });
  }

  void call(PyObject* const* args);
  std::string explain(PyObject* const* args);
  /// A call that a CUDA graph of this sequence made: what it wrote has been written to, and it is a hit.
  void note_replay(PyObject* const* args) const {
    bump_versions(args);
    counters_.hits.fetch_add(1, std::memory_order_relaxed);
  }
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
  std::vector<DoorStep> steps_;
  std::vector<at::Tensor> constants_;  ///< whatever their owners do, this memory stays
  std::vector<at::Tensor> written_;    ///< constants that are written, as they were given
  std::vector<size_t> written_slots_;
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
    // Of tensors too: a plan compares the integers of all slots.
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
    if (HD_UNLIKELY(!is_exact_tensor_type(Py_TYPE(object))))
      fail(Fault::kCaller, where(i), "is a ", Py_TYPE(object)->tp_name, "; it takes a torch.Tensor");
    const at::Tensor& tensor = tensor_of(object);
    if (HD_UNLIKELY(!is_plain(tensor.unsafeGetTensorImpl()->key_set())))
      fail(Fault::kCaller, where(i), "is no plain CPU or CUDA tensor (it is on ", tensor.device().str(),
           "): a sequence cannot be traced or transformed; call its ops");
    grad |= tensor.requires_grad();
    if (HD_UNLIKELY(grad) && c10::GradMode::is_enabled())
      fail(Fault::kCaller, where(i), "requires grad and grad mode is on; a sequence has no backward: call it under ",
           "torch.no_grad() or pass .detach()");
    view_of(tensor, slots[i].is_written, view);
    // A slot without dims may be on the CPU, as a foreign step's are.
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
  // Before anything is launched or counted.
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
    // Another plan of this M may have the layout, or the storages, of this call.
    if (update == SequencePlan::Update::kOther) continue;
    std::unique_ptr<Plan> taken = std::move(*at);
    plans_.erase(at);
    is_served = update == SequencePlan::Update::kReady;
    return taken;
  }
  // Plans of a table that serves no more would never be taken again, and hold the arena's memory.
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
  // Only here, after the launches: a call that threw has dropped its plan.
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
  without_gil([&] {
    // The lane's temporaries are one call's at a time; the GIL is free for whoever has the turn.
    const std::lock_guard lock(*plan.turn);
    const std::optional<LaunchContext> context =
        plan.launches.table() ? std::optional<LaunchContext>(std::in_place, *plan.launches.table()) : std::nullopt;
    std::optional<ProfiledSteps> profiled;
    if (HD_UNLIKELY(is_profiled())) profiled.emplace(sequence_, plan.launches.runs());
    result = plan.launches.launch(foreign, failed, profiled ? &*profiled : nullptr);
  });
  if (HD_UNLIKELY(result.status != LaunchStatus::kLaunched)) plan.launches.raise(result, failed);
}

void SequenceDoor::bump_versions(PyObject* const* args) const {
  for (const size_t i : written_slots_)
    if (args[i] != Py_None) bump_version(tensor_of(args[i]));
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
    if (sequence_.slots()[i].is_tensor && args[i] != Py_None) found[i] = tensor_of(args[i]);
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
  for (const SequenceArgument& arg : steps_[run.step].args) {
    if (arg.kind == SequenceArgument::Kind::kTensor) {
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
  const DoorStep& step = steps_[run.step];
  for (size_t i = 0; i < stack.size(); ++i) {
    const SequenceArgument& arg = step.args[i];
    if (arg.kind == SequenceArgument::Kind::kTensor) {
      const StepTensor& source = sequence_.steps()[run.step].tensors[arg.index];
      if (source.is_temp) continue;
      at::Tensor found = tensor(source, run, plan, inputs, slots);
      stack[i] = found.defined() ? c10::IValue(std::move(found)) : c10::IValue();
    } else if (arg.kind == SequenceArgument::Kind::kResult) {
      stack[i] = results[arg.index];
    } else if (arg.kind == SequenceArgument::Kind::kInteger) {
      const int64_t value = inputs.integers[arg.index];
      stack[i] = arg.is_flag    ? c10::IValue(value != 0)
                 : arg.is_float ? c10::IValue(static_cast<double>(value))
                                : c10::IValue(value);
    }
  }
  // As torch's own ops call each other: nothing of a sequence is recorded for a backward.
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
  // With the GIL if the turn is free, without it if another thread, which may need it, has the turn.
  std::unique_lock turn(*plan.turn, std::try_to_lock);
  if (!turn) without_gil([&] { turn.lock(); });
  const SequenceInputs inputs = this->inputs(given, plan);
  const std::vector<at::Tensor> slots = tensors(args);
  const std::vector<SequenceRun> runs = sequence_.order(given.m);
  std::vector<at::Tensor> results(steps_.size());
  for (const SequenceRun& run : runs) {
    const DoorStep& step = steps_[run.step];
    if (!step.op) {
      without_gil([&] { call_foreign(run, make_stack(run, plan, inputs), plan, inputs, slots, results); });
      continue;
    }
    std::vector<py::object> made;
    std::vector<PyObject*> pointers;
    for (const SequenceArgument& arg : step.args) {
      if (arg.kind == SequenceArgument::Kind::kValue) {
        made.push_back(arg.object);
      } else if (arg.kind == SequenceArgument::Kind::kInteger) {
        made.push_back(py::int_(given.integers[arg.index]));
      } else {
        const at::Tensor found = tensor(sequence_.steps()[run.step].tensors[arg.index], run, plan, inputs, slots);
        made.push_back(found.defined() ? py::reinterpret_steal<py::object>(wrap_tensor(found)) : py::none());
      }
      pointers.push_back(made.back().ptr());
    }
    PyObject* result = PyObject_Vectorcall(reinterpret_cast<PyObject*>(const_cast<OpObject*>(step.op)), pointers.data(),
                                           pointers.size(), nullptr);
    if (!result) throw_python_error();
    Py_DECREF(result);
  }
}

std::string SequenceDoor::explain(PyObject* const* args) {
  Given given;
  read(args, given);
  const TableReader reader;
  const std::unique_ptr<Plan> plan = make_plan(given, lane_of(given));
  std::string said = hdispatch::explain(sequence_, inputs(given, *plan));
  if (no_modes()) return said;
  return said.insert(said.find('\n'),
                     "\nmode     a dispatch or function mode of torch's is on: each step is a call of its own");
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

PyObject* sequence_vectorcall(PyObject* callable, PyObject* const* args, size_t flags, PyObject* keyword_names) {
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

/// A method's body, which may throw.
template <typename Body>
PyObject* method(PyObject* self, const Body& body) {
  try {
    return body(*reinterpret_cast<SequenceObject*>(self)->door);
  } catch (abi::__forced_unwind&) {
    throw;
  } catch (...) {
    set_python_error();
    return nullptr;
  }
}

PyObject* note_replay(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  return method(self, [&](const SequenceDoor& door) {
    if (HD_LIKELY(static_cast<size_t>(count) == door.sequence().slots().size()))
      door.note_replay(args);
    else
      door.note_replay(gather(door.sequence(), args, static_cast<size_t>(count), nullptr).data());
    return Py_NewRef(Py_None);
  });
}

PyObject* order_slots(PyObject* self, PyObject* const* args, Py_ssize_t count, PyObject* keyword_names) {
  return method(self, [&](const SequenceDoor& door) {
    const auto all = gather(door.sequence(), args, static_cast<size_t>(count), keyword_names);
    PyObject* made = PyTuple_New(static_cast<Py_ssize_t>(all.size()));
    for (size_t i = 0; made && i < all.size(); ++i)
      PyTuple_SET_ITEM(made, static_cast<Py_ssize_t>(i), Py_NewRef(all[i]));
    return made;
  });
}

void deallocate(PyObject* self) {
  PyTypeObject* type = Py_TYPE(self);
  delete reinterpret_cast<SequenceObject*>(self)->door;
  PyObject_Free(self);
  Py_DECREF(type);
}

PyObject* sequence_name(PyObject* self, void*) {
  return PyUnicode_FromString(reinterpret_cast<SequenceObject*>(self)->door->sequence().name().c_str());
}
PyObject* get_arena_bytes(PyObject* self, void*) {
  return PyLong_FromSize_t(reinterpret_cast<SequenceObject*>(self)->door->sequence().arena_bytes());
}
PyObject* sequence_repr(PyObject* self) {
  const Sequence& sequence = reinterpret_cast<SequenceObject*>(self)->door->sequence();
  return PyUnicode_FromFormat("<hdispatch sequence %s of %zu steps>", sequence.name().c_str(), sequence.steps().size());
}

/// Never freed, as those of ops: what was counted stays when a sequence goes.
std::map<std::string, OpCounters>& all_counters() {
  static auto* counters = new std::map<std::string, OpCounters>;
  return *counters;
}

OpCounters& counters_of(const std::string& name) { return all_counters()[name]; }

}  // namespace

PyObject* make_sequence(PyObject* type, const std::string& name, const py::list& slots, const py::list& temps,
                        const py::list& steps, int64_t max_rows, std::shared_ptr<Arena> arena,
                        const OpObject& (*as_op)(const py::handle&)) {
  SequenceParts parts = read_steps(name, steps, as_op);
  auto door = std::make_unique<SequenceDoor>(
      Sequence(name, read_slots(slots), read_temps(temps), std::move(parts.steps), max_rows),
      std::move(parts.door_steps), std::move(parts.constants), std::move(parts.written), std::move(arena));
  SequenceObject* self = PyObject_New(SequenceObject, reinterpret_cast<PyTypeObject*>(type));
  if (!self) throw_python_error();
  self->vectorcall = sequence_vectorcall;
  self->door = door.release();
  return reinterpret_cast<PyObject*>(self);
}

std::string explain_sequence(PyObject* sequence, const py::args& args, const py::kwargs& by_name) {
  SequenceDoor& door = *reinterpret_cast<SequenceObject*>(sequence)->door;
  std::vector<PyObject*> given;
  for (const auto& arg : args) given.push_back(arg.ptr());
  py::tuple names(by_name.size());
  size_t named = 0;
  for (const auto& [name, value] : by_name) {
    given.push_back(value.ptr());
    names[named++] = name;
  }
  return door.explain(gather(door.sequence(), given.data(), args.size(), names.ptr()).data());
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
  static PyMethodDef methods[] = {
      {"note_replay", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&note_replay)), METH_FASTCALL,
       "A CUDA graph of this sequence has made a call with these slots: count it, and what it has written."},
      {"order_slots", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&order_slots)),
       METH_FASTCALL | METH_KEYWORDS, "All slots of a call in order, given by position or name."},
      {nullptr, nullptr, 0, nullptr}};
  static PyGetSetDef getset[] = {
      {"name", sequence_name, nullptr, "The sequence's name.", nullptr},
      {"arena_bytes", get_arena_bytes, nullptr, "Bytes of temporaries, for max_rows rows.", nullptr},
      {nullptr, nullptr, nullptr, nullptr, nullptr}};
  static PyType_Slot slots[] = {{Py_tp_call, reinterpret_cast<void*>(&PyVectorcall_Call)},
                                {Py_tp_repr, reinterpret_cast<void*>(&sequence_repr)},
                                {Py_tp_dealloc, reinterpret_cast<void*>(&deallocate)},
                                {Py_tp_members, members},
                                {Py_tp_methods, methods},
                                {Py_tp_getset, getset},
                                {0, nullptr}};
  static PyType_Spec spec = {"hdispatch._C.Sequence", sizeof(SequenceObject), 0,
                             Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL | Py_TPFLAGS_DISALLOW_INSTANTIATION,
                             slots};
  return PyType_FromSpec(&spec);
}

}  // namespace hdispatch
