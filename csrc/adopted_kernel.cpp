// adopted_kernel.cpp -- serving calls of adopted kernels, and learning from the calls that Triton makes.
#include "adopted_kernel.h"

#include <c10/core/impl/VirtualGuardImpl.h>

#include <algorithm>
#include <mutex>

#include "adopted_learn.h"
#include "python_errors.h"
#include "tensor_view.h"

namespace hdispatch {

AdoptedCallbacks adopted_callbacks;
PyObject* adopted_type;
PyObject* patched_method_type;

namespace {

int device_count = 1;

/// A Python error as an exception, for the door.
[[noreturn]] HD_COLD void raise() { throw_python_error(); }

}  // namespace

void set_adopted_device_count(int count) { device_count = count; }

DeviceSlot adopted_slot(bool is_null) {
  if (HD_UNLIKELY(is_null)) return kCpuSlot;
  if (HD_LIKELY(device_count == 1)) return 1;
  return slot_of(c10::impl::VirtualGuardImpl(c10::DeviceType::CUDA).getDevice());
}

// ---- calls ----

namespace {

/// What every kernel's rows depend on: Triton's knobs.
WatchedState& process_state() {
  static auto* state = new WatchedState;
  return *state;
}

HD_COLD void refresh(WatchedState& state, PyObject* callback, PyObject* kernel) {
  const Owned given{PyObject_CallFunctionObjArgs(callback, kernel, nullptr)};
  if (!given.object || !state.set(given.object)) raise();
}

/// A grid dimension; -1 for what Triton is to judge.
int64_t dimension_of(PyObject* object) {
  if (HD_UNLIKELY(Py_TYPE(object) != &PyLong_Type)) return -1;
  int overflow = 0;
  const long long value = PyLong_AsLongLongAndOverflow(object, &overflow);
  return overflow || value < 0 || value > INT32_MAX ? -1 : value;
}

enum class GridState : uint8_t { kGood, kEmpty, kOdd };

/// The blocks of a launch from its dimensions, if they are some.
GridState check_grid(uint32_t cluster, const std::array<uint32_t, 3>& blocks) {
  if (HD_UNLIKELY(uint64_t{blocks[0]} * cluster > INT32_MAX)) return GridState::kOdd;
  return HD_LIKELY(blocks[0] && blocks[1] && blocks[2]) ? GridState::kGood : GridState::kEmpty;
}

GridState read_grid(PyObject* grid, uint32_t cluster, std::array<uint32_t, 3>& out) {
  const bool is_tuple = PyTuple_CheckExact(grid);
  if (HD_UNLIKELY(!is_tuple && !PyList_CheckExact(grid))) return GridState::kOdd;
  const Py_ssize_t size = is_tuple ? PyTuple_GET_SIZE(grid) : PyList_GET_SIZE(grid);
  if (HD_UNLIKELY(size < 1 || size > 3)) return GridState::kOdd;
  out = {1, 1, 1};
  for (Py_ssize_t i = 0; i < size; ++i) {
    const int64_t value = dimension_of(is_tuple ? PyTuple_GET_ITEM(grid, i) : PyList_GET_ITEM(grid, i));
    if (HD_UNLIKELY(value < 0)) return GridState::kOdd;
    out[static_cast<size_t>(i)] = static_cast<uint32_t>(value);
  }
  return check_grid(cluster, out);
}

/// The same from a program's results.
GridState read_grid(const HostValue* values, size_t count, uint32_t cluster, std::array<uint32_t, 3>& out) {
  out = {1, 1, 1};
  for (size_t i = 0; i < count; ++i) {
    if (values[i].kind != HostValue::Kind::kInteger || values[i].integer < 0 || values[i].integer > INT32_MAX)
      return GridState::kOdd;
    out[i] = static_cast<uint32_t>(values[i].integer);
  }
  return check_grid(cluster, out);
}

/// All arguments by name, as a callable grid and heuristics get them.
PyObject* make_arguments(const AdoptedKernel& self, const AdoptedCall& call, const AdoptedEntry& entry) {
  PyObject* made = entry.constants ? PyDict_Copy(entry.constants) : PyDict_New();
  if (!made) raise();
  const auto& parameters = self.reader->parameters();
  for (size_t i = 0; i < parameters.size(); ++i)
    if (call.objects[i] && PyDict_SetItem(made, parameters[i].name, call.objects[i]) != 0) {
      Py_DECREF(made);
      raise();
    }
  return made;
}

/// What heuristics give, each held as long as this lives.
struct Computed : ComputedArguments {
  ~Computed() {
    for (PyObject* each : parameters) Py_XDECREF(each);
    for (PyObject* each : options) Py_DECREF(each);
  }
};

/// One call, on the stack.
struct Calling {
  AdoptedKernel& self;
  PyObject* grid;
  PyObject* const* args;
  size_t positional;
  PyObject* keyword_names;
  const CallForm& form;

  size_t keywords() const { return keyword_names ? static_cast<size_t>(PyTuple_GET_SIZE(keyword_names)) : 0; }
};

/// `run` as `kernel[grid]` finds it: bound, and the kernel's own where somebody has put one over Triton's.
HD_COLD PyObject* find_run(const AdoptedKernel& self) {
  PyObject* found = PyObject_GetAttrString(self.kernel, "run");
  const bool is_bound = found && PyMethod_Check(found);
  if (!is_bound || !Py_IS_TYPE(PyMethod_GET_FUNCTION(found), reinterpret_cast<PyTypeObject*>(patched_method_type)) ||
      !self.is_on)
    return found;
  Py_DECREF(found);
  return PyMethod_New(self.run, self.kernel);
}

/// Triton's own call: run(kernel, *args, grid=, warmup=False, **keywords).
HD_COLD PyObject* call_triton(const Calling& calling, PyObject* grid) {
  static PyObject* const own[] = {PyUnicode_InternFromString("grid"), PyUnicode_InternFromString("warmup")};
  const size_t given = calling.positional + calling.keywords();
  std::vector<PyObject*> all{calling.self.kernel};
  all.insert(all.end(), calling.args, calling.args + given);
  if (calling.form.is_run) {
    if (grid && calling.form.grid >= 0) all[1 + static_cast<size_t>(calling.form.grid)] = grid;
    return PyObject_Vectorcall(calling.self.run, all.data(), 1 + calling.positional, calling.keyword_names);
  }
  const Owned run{find_run(calling.self)};
  if (!run.object) return nullptr;
  all.push_back(grid ? grid : calling.grid);
  all.push_back(Py_False);
  const Owned names{PyTuple_New(static_cast<Py_ssize_t>(calling.keywords() + 2))};
  if (!names.object) return nullptr;
  for (size_t i = 0; i < calling.keywords() + 2; ++i) {
    PyObject* name = i < calling.keywords() ? PyTuple_GET_ITEM(calling.keyword_names, i) : own[i - calling.keywords()];
    PyTuple_SET_ITEM(names.object, i, Py_NewRef(name));
  }
  return PyObject_Vectorcall(run.object, all.data() + 1, calling.positional, names.object);
}

HD_COLD void count(const AdoptedKernel& self, const std::string& reason) {
  self.counters->fallbacks.fetch_add(1, std::memory_order_relaxed);
  const std::lock_guard lock(OpCounters::mutex);
  ++self.counters->misses[reason];
}

HD_COLD PyObject* leave_to_triton(const Calling& calling, const std::string& reason, PyObject* grid = nullptr) {
  count(calling.self, reason);
  PyObject* result = call_triton(calling, grid);
  if (calling.self.tuner) calling.self.tuner->forget_shown();  // Triton shows the one of its call
  return result;
}

/// A call of a kernel that is not served, counted once: a `run` of its class's own may lead to Triton's, which is ours.
HD_COLD PyObject* leave_refused(const Calling& calling) {
  thread_local const AdoptedKernel* under_way = nullptr;
  struct Inside {
    const AdoptedKernel* outer;
    ~Inside() { under_way = outer; }
  };
  const Inside inside{std::exchange(under_way, &calling.self)};
  if (inside.outer == &calling.self) return call_triton(calling, nullptr);
  return leave_to_triton(calling, *calling.self.refusal);
}

HD_COLD uint32_t number_of_state(const AdoptedKernel& self) {
  return static_cast<uint32_t>(process_state().number()) << 16 | static_cast<uint32_t>(self.state->number());
}

/// The keywords of a call as a wrapper gives them to what it is around: with what heuristics gave.
HD_COLD PyObject* make_keywords(const Calling& calling, const ComputedArguments* computed) {
  PyObject* made = PyDict_New();
  bool failed = !made;
  for (size_t i = 0; i < calling.keywords(); ++i)
    failed = failed || PyDict_SetItem(made, PyTuple_GET_ITEM(calling.keyword_names, i),
                                      calling.args[calling.positional + i]) != 0;
  if (computed)
    for (const AdoptedHeuristic& each : *calling.self.heuristics) {
      PyObject* value = each.parameter < 0 ? nullptr : computed->parameters[static_cast<size_t>(each.parameter)];
      failed = failed || (value && PyDict_SetItem(made, each.name, value) != 0);
    }
  if (!failed) return made;
  Py_XDECREF(made);
  raise();
}

/// What the autotuner has chosen for a call that it has made, owned; null if somebody has taken that back meanwhile.
HD_COLD PyObject* find_choice(const Calling& calling, const ComputedArguments* computed, uint32_t choices) {
  AdoptedTuner& tuner = *calling.self.tuner;
  const Owned keywords{make_keywords(calling, computed)};
  const Owned positional{PyTuple_New(static_cast<Py_ssize_t>(calling.positional))};
  if (!positional.object) raise();
  for (size_t i = 0; i < calling.positional; ++i)
    PyTuple_SET_ITEM(positional.object, static_cast<Py_ssize_t>(i), Py_NewRef(calling.args[i]));
  const Owned said{PyObject_CallFunctionObjArgs(adopted_callbacks.choice, calling.self.kernel, positional.object,
                                                keywords.object, nullptr)};
  if (!said.object) raise();
  if (said.object == Py_None) return nullptr;
  PyObject *key = nullptr, *config = nullptr;
  if (!PyArg_ParseTuple(said.object, "OO", &key, &config)) raise();
  if (tuner.choices() != choices || !tuner.has_its_parts() || !tuner.has_chosen(key, config)) return nullptr;
  return Py_NewRef(config);
}

/// A call of a key that no row has with the choices that hold.
HD_COLD PyObject* call_and_learn(const Calling& calling, AdoptedCall& call, const ComputedArguments* computed,
                                 DeviceSlot slot, const char* why, uint32_t choices) {
  const int process_number = process_state().number(), kernel_number = calling.self.state->number();
  PyObject* compiled = leave_to_triton(calling, why);
  if (!compiled) return nullptr;
  Owned result{compiled};
  // The first call of all computes what the code depends on.
  WatchedState& process = process_state();
  if (!process.is_same()) refresh(process, adopted_callbacks.process_state, nullptr);
  if (!calling.self.state->is_same()) refresh(*calling.self.state, adopted_callbacks.kernel_state, calling.self.kernel);
  const bool is_known = kernel_number > 0;  // the code's number is 0 until Triton has hashed it
  if (process.number() != process_number || (is_known && calling.self.state->number() != kernel_number))
    return std::exchange(result.object, nullptr);  // another thread's write meanwhile: which code this is is not known
  Owned config;
  if (calling.self.tuner) {
    config.object = find_choice(calling, computed, choices);
    if (!config.object) return std::exchange(result.object, nullptr);
  }
  const char* reason = nullptr;
  if (process.number() >= 0 && calling.self.state->number() >= 0 &&
      calling.self.reader->read(calling.form, calling.args, computed, slot, number_of_state(calling.self), call,
                                reason))
    learn(calling.self, call, {slot == kCpuSlot ? &null_driver() : &cuda_driver(), slot, nullptr, device_count == 1},
          compiled, choices, config.object);
  return std::exchange(result.object, nullptr);
}

// ---- serving ----

/// What must hold before a key is computed; the reason why it does not, or null.
inline const char* objection(AdoptedKernel& self) {
  WatchedState& process = process_state();
  if (HD_UNLIKELY(!process.is_same())) refresh(process, adopted_callbacks.process_state, nullptr);
  if (HD_UNLIKELY(!self.state->is_same())) refresh(*self.state, adopted_callbacks.kernel_state, self.kernel);
  if (HD_UNLIKELY(process.number() < 0)) return process.reason().c_str();
  if (HD_UNLIKELY(self.state->number() < 0)) return self.state->reason().c_str();
  if (HD_UNLIKELY(!process.has_no_hooks())) return "launch hook";
  if (HD_UNLIKELY(!self.state->has_no_hooks())) return "pre-run hook";
  if (HD_UNLIKELY(!self.state->has_its_globals())) {
    if (PyErr_Occurred()) raise();
    return "captured global changed";
  }
  if (HD_UNLIKELY(!no_modes())) return "torch mode";
  return nullptr;
}

constexpr const char* kTakenBack = "autotuner's choices taken back";

/// The choices that hold now; 0 for a kernel without an autotuner. With `reason` set nothing is served.
inline uint32_t choices_of(const AdoptedKernel& self, const char*& reason) {
  if (HD_LIKELY(!self.tuner)) return 0;
  const uint32_t choices = self.tuner->choices();
  if (HD_UNLIKELY(!self.tuner->has_its_parts())) reason = "autotuner's kernel, keys, configurations or run replaced";
  return choices;
}

/// Whether the choices that an entry was made of hold. If not, `choices` is the number of those that do.
inline bool is_chosen(const AdoptedKernel& self, const AdoptedEntry& entry, uint32_t& choices) {
  if (HD_UNLIKELY(entry.choices != choices)) return false;
  if (HD_LIKELY(!entry.config) || HD_LIKELY(entry.has_its_config())) return true;
  choices = self.tuner->take_back();
  return false;
}

/// Triton's own argument of a heuristic: what was given, by name, and what heuristics before it gave.
HD_COLD PyObject* make_given(const Calling& calling, PyObject* const* objects) {
  const auto& parameters = calling.self.reader->parameters();
  PyObject* made = PyDict_New();
  bool failed = !made;
  for (size_t i = 0; i < parameters.size(); ++i)
    failed = failed || (objects[i] && PyDict_SetItem(made, parameters[i].name, objects[i]) != 0);
  for (size_t i = 0; i < calling.keywords(); ++i)
    failed = failed || PyDict_SetItem(made, PyTuple_GET_ITEM(calling.keyword_names, i),
                                      calling.args[calling.positional + i]) != 0;
  if (!calling.form.is_run)
    failed = failed || PyDict_SetItemString(made, "grid", calling.grid) != 0 ||
             PyDict_SetItemString(made, "warmup", Py_False) != 0;
  if (!failed) return made;
  Py_XDECREF(made);
  raise();
}

PyObject* to_object(const HostValue& value) {
  if (value.kind == HostValue::Kind::kInteger) return PyLong_FromLongLong(value.integer);
  return Py_NewRef(value.kind == HostValue::Kind::kObject ? value.object : value.integer ? Py_True : Py_False);
}

void compute(const Calling& calling, Computed& out) {
  const AdoptedKernel& self = calling.self;
  const size_t parameters = self.reader->parameters().size();
  PyObject* objects[kMaxAdoptedArguments];
  for (size_t i = 0; i < parameters; ++i)
    objects[i] = calling.form.sources[i] >= 0 ? calling.args[calling.form.sources[i]] : nullptr;
  out.parameters.assign(parameters, nullptr);
  std::vector<std::pair<PyObject*, PyObject*>> options;  // what heuristics gave that are no parameters
  const auto make = [&] {
    PyObject* made = make_given(calling, objects);
    for (const auto& [name, value] : options)
      if (PyDict_SetItem(made, name, value) != 0) {
        Py_DECREF(made);
        raise();
      }
    return made;
  };
  for (const AdoptedHeuristic& each : *self.heuristics) {
    HostValue result[HostProgram::kMaxOutputs];
    size_t count = 0;
    PyObject* value = nullptr;
    if (self.programs->run({each.function, objects, nullptr}, adopted_callbacks.trace, self.kernel, make, result,
                           count) &&
        count == 1) {
      value = to_object(result[0]);
    } else {
      const Owned given{make()};
      value = PyObject_CallOneArg(each.function, given.object);
    }
    if (!value) raise();
    if (each.parameter < 0) {
      out.options.push_back(value);
      options.emplace_back(each.name, value);
      continue;
    }
    const auto index = static_cast<size_t>(each.parameter);
    Py_XSETREF(out.parameters[index], value);
    objects[index] = value;
  }
}

/// The launch of an entry's row, for a grid that is one.
PyObject* launch(AdoptedKernel& self, const AdoptedEntry& entry, AdoptedCall& call, const std::array<uint32_t, 3>& grid,
                 CUresult& result) {
  const AdoptedRow& row = *entry.row;
  const CUstream stream = current_stream(row.place().slot);
  if (HD_LIKELY(row.has_room(stream))) {
    result = row.launch(call.values, grid, stream);
  } else {
    const Owned held{Py_NewRef(reinterpret_cast<PyObject*>(&self))};
    PyThreadState* released = PyEval_SaveThread();
    result = row.launch(call.values, grid, stream);
    PyEval_RestoreThread(released);
  }
  if (HD_UNLIKELY(result != kCudaSuccess)) return nullptr;
  self.counters->hits.fetch_add(1, std::memory_order_relaxed);
  if (HD_UNLIKELY(entry.config != nullptr)) self.tuner->show(entry.config);
  return Py_NewRef(entry.compiled);
}

/// The grid, in Python's words only where a callable one had to be called: `evaluated`.
GridState find_grid(const Calling& calling, const AdoptedCall& call, const AdoptedEntry& entry,
                    std::array<uint32_t, 3>& blocks, Owned& evaluated) {
  AdoptedKernel& self = calling.self;
  PyObject* grid = calling.form.is_run ? calling.args[calling.form.grid] : calling.grid;
  const uint32_t cluster = entry.row->cluster();
  if (HD_LIKELY(PyTuple_CheckExact(grid)) || !PyCallable_Check(grid)) return read_grid(grid, cluster, blocks);
  const auto make = [&] { return make_arguments(self, call, entry); };
  HostValue values[HostProgram::kMaxOutputs];
  size_t count = 0;
  if (HD_LIKELY(self.programs->run({grid, call.objects, entry.constants}, adopted_callbacks.trace, self.kernel, make,
                                   values, count)))
    return read_grid(values, count, cluster, blocks);
  const Owned arguments{make()};
  evaluated.object = PyObject_CallOneArg(grid, arguments.object);
  if (!evaluated.object) raise();
  return read_grid(evaluated.object, cluster, blocks);
}

PyObject* serve(const Calling& calling, const ComputedArguments* computed) {
  AdoptedKernel& self = calling.self;
  const DeviceSlot slot = adopted_slot(self.is_null);
  AdoptedCall call;
  const char* reason = nullptr;
  uint32_t choices = choices_of(self, reason);
  if (HD_UNLIKELY(reason != nullptr)) return leave_to_triton(calling, reason);
  if (HD_UNLIKELY(!self.reader->read(calling.form, calling.args, computed, slot, number_of_state(self), call, reason)))
    return leave_to_triton(calling, reason);
  const AdoptedEntry* entry = self.table->find(call);
  if (HD_UNLIKELY(!entry)) {
    if (self.table->is_full()) return leave_to_triton(calling, "more keys than are kept");
    return call_and_learn(calling, call, computed, slot, "first call of a key", choices);
  }
  if (HD_UNLIKELY(!is_chosen(self, *entry, choices)))
    return call_and_learn(calling, call, computed, slot, kTakenBack, choices);
  if (HD_UNLIKELY(!entry->row)) return leave_to_triton(calling, entry->reason);
  Owned evaluated;
  std::array<uint32_t, 3> blocks;
  switch (find_grid(calling, call, *entry, blocks, evaluated)) {
    case GridState::kGood:
      break;
    case GridState::kEmpty:
      self.counters->empty.fetch_add(1, std::memory_order_relaxed);
      return Py_NewRef(entry->compiled);
    default:
      return leave_to_triton(calling, "grid", evaluated.object);
  }
  CUresult result = kCudaSuccess;
  PyObject* compiled = launch(self, *entry, call, blocks, result);
  if (HD_LIKELY(compiled != nullptr)) return compiled;
  return leave_to_triton(calling, "driver's refusal", evaluated.object);  // Triton raises its own error
}

}  // namespace

PyObject* AdoptedKernel::call(PyObject* grid, PyObject* const* args, size_t positional, PyObject* keyword_names) {
  const Calling calling{*this, grid, args, positional, keyword_names, reader->form(positional, keyword_names, !grid)};
  if (HD_UNLIKELY(!is_on)) return call_triton(calling, nullptr);  // of a launch that was kept
  if (HD_UNLIKELY(refusal != nullptr)) return leave_refused(calling);
  if (HD_UNLIKELY(calling.form.is_wrong)) return leave_to_triton(calling, "arguments");
  if (calling.form.is_run) {
    if (calling.form.grid < 0) return leave_to_triton(calling, "arguments");
    if (calling.form.warmup >= 0 && args[calling.form.warmup] != Py_False) return leave_to_triton(calling, "warm-up");
  }
  if (const char* reason = objection(*this)) return leave_to_triton(calling, reason);
  if (HD_LIKELY(heuristics->empty())) return serve(calling, nullptr);
  Computed computed;
  compute(calling, computed);
  return serve(calling, &computed);
}

bool AdoptedKernel::launch(const CallForm& form, PyObject* const* args, const GivenValue* given,
                           const int64_t (&grid)[3], const char*& reason) {
  if (HD_UNLIKELY(!is_on)) return reason = "its Triton kernel was given back", false;
  if (HD_UNLIKELY(refusal != nullptr)) return reason = refusal->c_str(), false;
  reason = objection(*this);
  if (HD_UNLIKELY(reason != nullptr)) return false;
  AdoptedCall call;
  uint32_t choices = choices_of(*this, reason);
  if (HD_UNLIKELY(reason != nullptr)) return false;
  if (HD_UNLIKELY(
          !reader->read(form, args, nullptr, adopted_slot(is_null), number_of_state(*this), call, reason, given)))
    return false;
  const AdoptedEntry* entry = table->find(call);
  if (HD_UNLIKELY(!entry)) return reason = "first call of a key", false;
  if (HD_UNLIKELY(!is_chosen(*this, *entry, choices))) return reason = kTakenBack, false;
  if (HD_UNLIKELY(!entry->row)) return reason = entry->reason.c_str(), false;
  HostValue values[3];
  for (size_t i = 0; i < 3; ++i) values[i] = {HostValue::Kind::kInteger, grid[i], nullptr};
  std::array<uint32_t, 3> blocks;
  const GridState state = read_grid(values, 3, entry->row->cluster(), blocks);
  if (HD_UNLIKELY(state == GridState::kOdd)) return reason = "grid", false;
  if (HD_UNLIKELY(state == GridState::kEmpty)) return true;
  CUresult result = kCudaSuccess;
  PyObject* compiled = hdispatch::launch(*this, *entry, call, blocks, result);
  if (HD_UNLIKELY(!compiled)) return reason = "driver's refusal", false;
  Py_DECREF(compiled);
  return true;
}

double AdoptedKernel::bench_ns(PyObject* const* args, size_t count, const std::array<uint32_t, 3>& grid,
                               uint32_t launches) {
  const DeviceSlot slot = adopted_slot(is_null);
  AdoptedCall call;
  const char* reason = refusal ? refusal->c_str() : objection(*this);
  const CallForm& form = reader->form(count, nullptr, false);
  const bool has_key = !reason && reader->read(form, args, nullptr, slot, number_of_state(*this), call, reason);
  const AdoptedEntry* entry = has_key ? table->find(call) : nullptr;
  if (!entry || !entry->row) fail(Fault::kCaller, *name, ": the call has no row; make it before");
  return entry->row->bench_ns(call.values, grid, current_stream(slot), launches);
}

}  // namespace hdispatch
