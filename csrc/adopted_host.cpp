// adopted_host.cpp -- reading host records, and serving calls with them.
#include "adopted_host.h"

#include <ATen/core/Tensor.h>
#include <c10/core/DefaultDtype.h>
#include <pybind11/stl.h>
#include <torch/csrc/Dtype.h>

#include <algorithm>
#include <mutex>

#include "empty_tensor.h"
#include "python_errors.h"
#include "tensor_view.h"
#include "torch_python.h"

namespace py = pybind11;

namespace hdispatch {

PyObject* host_kernel_type;

namespace {

constexpr size_t kMaxOutputs = 8;
constexpr size_t kMaxViews = 8;
constexpr size_t kMaxResultRank = 32;
constexpr size_t kMaxRecords = 1 << 14;  ///< of one kernel: then it is Helion's
/// Learning an entry takes 10 ms: a kernel whose calls bring another number each time (a seed) is not to pay that
/// always.
constexpr size_t kMaxLonely = 256;

std::vector<HostSteps> read_steps(const py::handle& listed, const HostLayout& layout) {
  std::vector<HostSteps> out;
  for (const auto& each : listed.cast<py::list>()) out.emplace_back(each.ptr(), layout);
  return out;
}

/// Takes the facts that are ranges out of `guards`, merged to one range per integer where that is possible.
std::vector<HostRange> take_ranges(std::vector<HostSteps>& guards) {
  std::vector<HostRange> ranges;
  std::erase_if(guards, [&](const HostSteps& guard) {
    const std::optional<HostRange> range = guard.as_range();
    if (range && std::ranges::none_of(ranges, [&](HostRange& each) { return each.merge(*range); }))
      ranges.push_back(*range);
    return range.has_value();
  });
  return ranges;
}

int8_t scalar_type_of(const py::handle& dtype) {
  if (dtype.is_none()) return 0;
  HD_CHECK(THPDtype_Check(dtype.ptr()), "a dtype is none of torch's");
  return static_cast<int8_t>(reinterpret_cast<THPDtype*>(dtype.ptr())->scalar_type);
}

/// None, a bool, an int or a float.
std::optional<c10::Scalar> read_fill(const py::handle& value) {
  if (value.is_none()) return std::nullopt;
  if (PyBool_Check(value.ptr())) return c10::Scalar(value.cast<bool>());
  return PyFloat_Check(value.ptr()) ? c10::Scalar(value.cast<double>()) : c10::Scalar(value.cast<int64_t>());
}

/// A call, as its expressions read it.
struct HostCall {
  PyObject* const* args;
  const int64_t* integers;  ///< the words of its key

  bool compute(const HostSteps& steps, int64_t& out) const { return steps.compute(integers, args, out); }
  bool compute(const std::vector<HostSteps>& steps, int64_t* out) const {
    for (const HostSteps& each : steps)
      if (HD_UNLIKELY(!compute(each, *out++))) return false;
    return true;
  }
};

}  // namespace

HostRecord::HostRecord(PyObject* made, const HostLayout& layout) : source_{Py_NewRef(made)} {
  const auto said = py::reinterpret_borrow<py::dict>(made);
  is_exact_ = said["is_exact"].cast<bool>();
  if (const py::object choice = said["choice"]; !choice.is_none()) choice_ = choice.ptr();
  guards_ = read_steps(said["guards"], layout);
  ranges_ = take_ranges(guards_);
  grid_ = read_steps(said["grid"], layout);
  HD_CHECK(grid_.size() == 3, grid_.size());
  for (const auto& item : said["outputs"].cast<py::list>()) {
    const auto each = item.cast<py::tuple>();
    outputs_.push_back({read_steps(each[0], layout), read_steps(each[1], layout), scalar_type_of(each[2]),
                        each[3].cast<uint16_t>(), read_fill(each[4])});
  }
  for (const auto& item : said["views"].cast<py::list>()) {
    const auto each = item.cast<py::tuple>();  // (output, sizes, strides, offset)
    const auto output = each[0].cast<size_t>();
    HD_CHECK(output < outputs_.size(), output);
    views_.push_back({output, read_steps(each[1], layout), read_steps(each[2], layout),
                      HostSteps(py::object(each[3]).ptr(), layout)});
  }
  for (const auto& item : said["params"].cast<py::list>()) {
    const auto each = item.cast<py::tuple>();  // (kind, index, dtype, steps, object)
    params_.push_back({static_cast<Param::Kind>(each[0].cast<int>()), each[1].cast<uint16_t>(), scalar_type_of(each[2]),
                       HostSteps(py::object(each[3]).ptr(), layout)});
    objects_.push_back(py::object(each[4]).ptr());
  }
  for (const auto& item : said["options"].cast<py::list>()) objects_.push_back(item.ptr());
  // `run` has arrays of as many on its stack.
  HD_CHECK(outputs_.size() <= kMaxOutputs && views_.size() <= kMaxViews, outputs_.size(), " and ", views_.size());
  const py::object function = said["function"];
  HD_CHECK(reinterpret_cast<PyObject*>(Py_TYPE(function.ptr())) == adopted_type, "the function is not adopted");
  function_ = reinterpret_cast<AdoptedKernel*>(function.ptr());
  HD_CHECK(params_.size() == function_->reader->parameters().size(), params_.size());
  form_ = &function_->reader->form(0, py::object(said["names"]).ptr(), false);
  variant_.dict = py::object(said["variant"]).ptr();  // held by the dict
  run_ = py::object(said["run"]).ptr();
  results_ = said["results"].cast<std::vector<int>>();
  for (const int each : results_) HD_CHECK(each < static_cast<int>(outputs_.size() + views_.size()), each);
  result_ = said["result"].cast<int>();
  is_tuple_ = said["is_tuple"].cast<bool>();
}

int HostRecord::traverse(visitproc visit, void* arg) const {
  Py_VISIT(source_.object);
  return 0;
}

bool HostRecord::holds(const uint64_t* words) {
  if (HD_UNLIKELY(!variant_.is_same())) {
    // Noted before it is read: a change in between then shows at the next call.
    WatchedDict seen = variant_;
    seen.note();
    static PyObject* const name = PyUnicode_InternFromString("_run");
    if (PyDict_GetItemWithError(variant_.dict, name) != run_) return false;  // tuned again, or reset
    variant_ = seen;
  }
  const auto* integers = reinterpret_cast<const int64_t*>(words);
  // Ranges first: two comparisons each, and what most calls of another shape fail.
  for (const HostRange& each : ranges_)
    if (HD_UNLIKELY(!each.holds(integers))) return false;
  int64_t holds = 0;
  for (const HostSteps& each : guards_)
    if (HD_UNLIKELY(!each.compute(integers, nullptr, holds) || !holds)) return false;
  return true;
}

PyObject* HostRecord::run(PyObject* const* args, const uint64_t* words, const char*& reason) const {
  const HostCall call{args, reinterpret_cast<const int64_t*>(words)};
  // Kept until the launch: where it is refused they are freed, and Helion makes its own.
  c10::SmallVector<at::Tensor, 2> outputs;
  int64_t dims[2 * kMaxResultRank];
  for (const Output& output : outputs_) {
    const size_t rank = output.sizes.size();
    if (!call.compute(output.sizes, dims) || !call.compute(output.strides, dims + rank))
      return reason = "sizes of more than 64 bits", nullptr;
    outputs.push_back(empty_tensor({dims, rank}, {dims + rank, rank}, static_cast<c10::ScalarType>(output.scalar_type),
                                   tensor_of(args[output.like]).device()));
    if (output.fill) without_gil([&] { outputs.back().fill_(*output.fill); });  // a launch: the queue may be full
  }
  GivenValue given[kMaxAdoptedArguments];
  for (size_t i = 0; i < params_.size(); ++i) {
    const Param& param = params_[i];
    given[i].kind = GivenValue::Kind::kObject;
    if (param.kind == Param::Kind::kObject) continue;
    int64_t value = 0;
    if (!call.compute(param.value, value)) return reason = "values of more than 64 bits", nullptr;
    given[i] = {GivenValue::Kind::kInteger, param.scalar_type, static_cast<uint64_t>(value)};
    if (param.kind == Param::Kind::kInteger) continue;
    given[i].kind = GivenValue::Kind::kPointer;
    const at::Tensor& base = param.kind == Param::Kind::kOutput ? outputs[param.index] : tensor_of(args[param.index]);
    c10::TensorImpl* impl = base.unsafeGetTensorImpl();
    given[i].value = HD_LIKELY(impl->numel() != 0) ? address_of(impl, true) + static_cast<uint64_t>(value) : 0;
  }
  // Before the launch: a view that throws leaves nothing launched.
  c10::SmallVector<at::Tensor, 2> views;
  for (const View& view : views_) {
    const size_t rank = view.sizes.size();
    int64_t offset = 0;
    if (!call.compute(view.sizes, dims) || !call.compute(view.strides, dims + rank) ||
        !call.compute(view.offset, offset))
      return reason = "sizes of more than 64 bits", nullptr;
    views.push_back(outputs[view.output].as_strided({dims, rank}, {dims + rank, rank}, offset));
  }
  int64_t grid[3];
  if (!call.compute(grid_, grid)) return reason = "grid", nullptr;
  if (!function_->launch(*form_, objects_.data(), given, grid, reason)) return nullptr;
  if (result_ == -2) Py_RETURN_NONE;
  PyObject* wrapped[kMaxOutputs + kMaxViews] = {};  // borrowed: one that is listed twice is the same object twice
  const auto result = [&](int index) {
    if (index < 0) return Py_NewRef(args[-1 - index]);
    const auto made = static_cast<size_t>(index);
    if (wrapped[made]) return Py_NewRef(wrapped[made]);
    // Moved, which torch knows to wrap faster.
    wrapped[made] = wrap_tensor(std::move(made < outputs_.size() ? outputs[made] : views[made - outputs_.size()]));
    if (!wrapped[made]) throw_python_error();
    return wrapped[made];
  };
  if (result_ == 0) return result(results_[0]);
  Owned listed{is_tuple_ ? PyTuple_New(static_cast<Py_ssize_t>(results_.size()))
                         : PyList_New(static_cast<Py_ssize_t>(results_.size()))};
  if (!listed.object) throw_python_error();
  for (size_t i = 0; i < results_.size(); ++i) {
    PyObject* item = result(results_[i]);
    is_tuple_ ? PyTuple_SET_ITEM(listed.object, i, item) : PyList_SET_ITEM(listed.object, i, item);
  }
  return std::exchange(listed.object, nullptr);
}

// ---- calls ----

namespace {

// Tags of words, beside those of exact words (adopted_key.cpp).
constexpr uint64_t kTagTensor = 4;
constexpr uint64_t kTagList = 5;
constexpr uint64_t kTagTuple = 6;
constexpr Py_ssize_t kMaxItems = 2 * HostKey::kMaxRank;  ///< of a list: its words are no more than a tensor's

/// The word of a value that is no tensor.
bool read_word(HostKernel& self, PyObject* object, uint64_t& word) {
  const bool is_known = PyLong_CheckExact(object) || PyFloat_CheckExact(object) || PyBool_Check(object) ||
                        object == Py_None || PyUnicode_CheckExact(object) || THPDtype_Check(object);
  return is_known && self.constants->exact_word(object, word);
}

/// The words of a list or a tuple of such values: its length, and each.
bool read_words(HostKernel& self, PyObject* object, HostKey& key) {
  const bool is_list = PyList_CheckExact(object);
  const Py_ssize_t count = PySequence_Fast_GET_SIZE(object);
  if (count > kMaxItems) return false;
  key.words[key.kind++] = static_cast<uint64_t>(count) << 3 | (is_list ? kTagList : kTagTuple);
  for (Py_ssize_t i = 0; i < count && i < PySequence_Fast_GET_SIZE(object); ++i)
    if (!read_word(self, PySequence_Fast_GET_ITEM(object, i), key.words[key.kind++])) return false;
  return true;
}

const char* read_key(HostKernel& self, PyObject* const* args, size_t count, HostKey& key) {
  const DeviceSlot slot = adopted_slot(self.is_null);
  uintptr_t storages[kMaxHostArguments];
  c10::TensorImpl* tensors[kMaxHostArguments];
  size_t tensor_count = 0;
  const auto default_type = static_cast<uint64_t>(c10::get_default_dtype_as_scalartype());  // of `torch.zeros(n)`
  key.words[0] = default_type << 48 | uint64_t{slot} << 32 | static_cast<uint32_t>(self.state->number());
  key.kind = 1;
  for (size_t i = 0; i < count; ++i) {
    PyObject* object = args[i];
    if (HD_UNLIKELY(PyList_CheckExact(object) || PyTuple_CheckExact(object))) {
      if (!read_words(self, object, key)) return "argument's type";
      continue;
    }
    uint64_t& word = key.words[key.kind++];
    if (!is_exact_tensor_type(Py_TYPE(object))) {
      if (!read_word(self, object, word)) return "argument's type";
      continue;
    }
    c10::TensorImpl* impl = tensor_of(object).unsafeGetTensorImpl();
    if (HD_UNLIKELY(!is_plain(impl->key_set()))) return "tensor that torch has to handle";
    // Its code was compiled for the current device, where it is launched.
    if (HD_UNLIKELY(slot_of(impl->device()) != slot)) return "tensor on another device";
    if (HD_UNLIKELY(impl->sizes().size() > HostKey::kMaxRank)) return "tensor of more than 8 dimensions";
    const uintptr_t storage = storage_of(impl, false);
    for (size_t k = 0; k < tensor_count; ++k)
      // A record was made of arguments that are apart: what one writes, another would read.
      if (HD_UNLIKELY(storages[k] == storage && storage)) return "arguments that share memory";
    storages[tensor_count] = storage;
    tensors[tensor_count++] = impl;
    // Triton compiles another kernel where an address is a multiple of 16.
    const uint64_t residue = impl->numel() ? address_of(impl, false) & 15 : 0;
    word = static_cast<uint64_t>(c10::typeMetaToScalarType(impl->dtype())) << 24 |
           static_cast<uint64_t>(impl->sizes().size()) << 12 | residue << 3 | kTagTensor;
  }
  // Behind the kind, so that one array serves to compare either with or without shapes.
  key.count = key.kind;
  for (size_t i = 0; i < tensor_count; ++i) {
    for (const int64_t each : tensors[i]->sizes()) key.words[key.count++] = static_cast<uint64_t>(each);
    for (const int64_t each : tensors[i]->strides()) key.words[key.count++] = static_cast<uint64_t>(each);
    key.words[key.count++] = static_cast<uint64_t>(tensors[i]->numel());
    key.words[key.count++] = tensors[i]->is_contiguous();
  }
  return nullptr;
}

/// Where the words of a key that `read_key` has read have what is known of its tensors.
HostLayout layout_of(PyObject* const* args, size_t count, const HostKey& key) {
  HostLayout layout;
  size_t first = key.kind;
  for (size_t i = 0; i < count; ++i) {
    HostLayout::Place& place = layout.places.emplace_back();
    if (!is_exact_tensor_type(Py_TYPE(args[i]))) continue;
    place = {first, static_cast<size_t>(tensor_of(args[i]).dim()), true};
    first += 2 * place.rank + 2;
  }
  return layout;
}

/// The entry that serves the call, or says why none does; null for a call that is new.
HD_COLD const HostEntry* find_other(const HostTable& table, const HostKey& key) {
  // A record for all shapes first: there are few, and most calls have one.
  for (const bool is_exact : {false, true}) {
    const size_t count = is_exact ? key.count : key.kind;
    const auto [first, last] = table.equal_range(key.hash(is_exact));
    for (auto each = first; each != last; ++each) {
      const HostEntry& entry = *each->second;
      if (!is_exact && entry.record && entry.record->choice()) continue;  // which one, the shape's own entry says
      if (entry.is_for(key.words, count) && (!entry.record || entry.record->holds(key.words))) return &entry;
    }
  }
  return nullptr;
}

/// The same, of a kernel: first the entry of the last call. Whatever record holds for a call serves it rightly.
const HostEntry* find_entry(HostKernel& self, const HostKey& key) {
  const HostEntry* recent = self.recent;
  if (HD_LIKELY(recent != nullptr) && recent->is_for(key.words, recent->is_of_kind ? key.kind : key.count) &&
      HD_LIKELY(recent->record->holds(key.words)))
    return recent;
  const HostEntry* found = find_other(*self.table, key);
  self.recent = found && found->record ? found : nullptr;
  return found;
}

HD_COLD PyObject* leave_to_helion(HostKernel& self, const std::string& reason, PyObject* args, PyObject* keywords) {
  self.counters->fallbacks.fetch_add(1, std::memory_order_relaxed);
  {
    const std::lock_guard lock(OpCounters::mutex);
    ++self.counters->misses[reason];
  }
  // The lock is released: Helion's Python may fork, or call another adopted kernel.
  std::vector<PyObject*> all{self.kernel};
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(args); ++i) all.push_back(PyTuple_GET_ITEM(args, i));
  return PyObject_VectorcallDict(self.call_function, all.data(), all.size(), keywords);
}

/// Helion's call where no record can be: afterwards, where it has made variants, their launches are adopted.
HD_COLD PyObject* leave_whole(HostKernel& self, const char* reason, PyObject* args, PyObject* keywords) {
  Owned result{leave_to_helion(self, reason, args, keywords)};
  if (!result.object || (self.variants.dict && self.variants.is_same())) return std::exchange(result.object, nullptr);
  WatchedDict seen = self.variants;
  if (seen.dict) seen.note();  // before: Python runs
  const Owned dict{PyObject_CallOneArg(adopted_callbacks.host_launches, self.kernel)};
  if (!dict.object) throw_python_error();
  const Owned former{self.variants.dict};
  self.variants = dict.object == seen.dict ? seen : WatchedDict{};  // not noted: it is looked at once more
  self.variants.dict = Py_NewRef(dict.object);
  return std::exchange(result.object, nullptr);
}

/// For a new shape of a kernel with a function that chooses its variant: asks it, once. The shape's entry; or null.
HD_COLD const HostEntry* choose(HostKernel& self, PyObject* args, const HostKey& key) {
  std::vector<std::shared_ptr<HostRecord>> found;  // held: Python runs
  const auto [first, last] = self.table->equal_range(key.hash(false));
  for (auto each = first; each != last; ++each) {
    const HostEntry& entry = *each->second;
    if (entry.record && entry.record->choice() && entry.is_for(key.words, key.kind)) found.push_back(entry.record);
  }
  if (found.empty() || self.table->size() >= kMaxRecords) return nullptr;
  const Owned said{PyObject_CallFunctionObjArgs(adopted_callbacks.host_choice, self.kernel, args, nullptr)};
  if (!said.object) throw_python_error();
  for (const auto& record : found) {
    const int is_same = PyObject_RichCompareBool(said.object, record->choice(), Py_EQ);  // as Helion's dict compares
    if (is_same < 0) throw_python_error();
    if (!is_same || !self.state->is_same() || !record->holds(key.words)) continue;
    auto entry = std::make_unique<HostEntry>();
    entry->words.assign(key.words, key.words + key.count);
    entry->record = record;
    entry->is_chosen = entry->has_come_again = true;
    return self.table->emplace(key.hash(true), std::move(entry))->second.get();
  }
  return nullptr;
}

HD_COLD void refresh_host(HostKernel& self) {
  const Owned given{PyObject_CallOneArg(adopted_callbacks.host_state, self.kernel)};
  if (!given.object || !self.state->set(given.object)) throw_python_error();
}

/// After Helion's own call: a record of it, or the reason why there is none.
HD_COLD void learn_host(HostKernel& self, PyObject* args, const HostKey& key) {
  const Owned said{PyObject_CallFunctionObjArgs(adopted_callbacks.host_record, self.kernel, args, nullptr)};
  if (!said.object) throw_python_error();
  auto entry = std::make_unique<HostEntry>();
  if (PyUnicode_Check(said.object)) {
    entry->reason = PyUnicode_AsUTF8(said.object);
  } else {
    const auto count = static_cast<size_t>(PyTuple_GET_SIZE(args));
    entry->record = std::make_shared<HostRecord>(said.object, layout_of(&PyTuple_GET_ITEM(args, 0), count, key));
    entry->reason = py::str(py::handle(said.object)["note"]);
  }
  const bool is_exact = !entry->record || entry->record->is_exact();
  entry->words.assign(key.words, key.words + (is_exact ? key.count : key.kind));
  entry->is_of_kind = !is_exact;
  // Until a call finds it.
  ++self.lonely;
  self.table->emplace(key.hash(is_exact), std::move(entry));
}

}  // namespace

PyObject* HostKernel::call(PyObject* args, PyObject* keywords) {
  const auto count = static_cast<size_t>(PyTuple_GET_SIZE(args));
  if (HD_UNLIKELY(keywords && PyDict_GET_SIZE(keywords))) return leave_whole(*this, "keywords", args, keywords);
  if (HD_UNLIKELY(count > kMaxHostArguments)) return leave_whole(*this, "more arguments than 32", args, keywords);
  if (HD_UNLIKELY(!no_modes())) return leave_to_helion(*this, "torch mode", args, keywords);
  if (HD_UNLIKELY(!state->is_same())) refresh_host(*this);
  if (HD_UNLIKELY(state->number() < 0)) return leave_to_helion(*this, state->reason(), args, keywords);
  PyObject* const* given = &PyTuple_GET_ITEM(args, 0);
  HostKey key;
  const char* reason = read_key(*this, given, count, key);
  if (HD_UNLIKELY(reason != nullptr)) return leave_whole(*this, reason, args, keywords);
  const HostEntry* entry = find_entry(*this, key);
  if (HD_UNLIKELY(!entry)) entry = choose(*this, args, key);
  if (HD_UNLIKELY(entry && !entry->has_come_again)) {
    entry->has_come_again = true;
    --lonely;
  }
  if (HD_LIKELY(entry && entry->record)) {
    PyObject* result = entry->record->run(given, key.words, reason);
    if (HD_UNLIKELY(!result))
      return leave_to_helion(*this, reason, args, keywords);  // its Triton kernel learns from it
    counters->hits.fetch_add(1, std::memory_order_relaxed);
    return result;
  }
  if (entry) return leave_to_helion(*this, entry->reason, args, keywords);
  if (table->size() >= kMaxRecords) return leave_whole(*this, "more keys than are kept", args, keywords);
  if (lonely >= kMaxLonely) return leave_whole(*this, "keys that do not come again", args, keywords);
  Owned result{leave_to_helion(*this, "first call of a key", args, keywords)};
  if (!result.object) return nullptr;
  refresh_host(*this);  // the call wrote to what is watched
  if (state->number() >= 0 && !read_key(*this, given, count, key)) learn_host(*this, args, key);
  return std::exchange(result.object, nullptr);
}

// ---- the type ----

std::vector<HostKernel*>& host_kernels() {
  static auto* made = new std::vector<HostKernel*>;
  return *made;
}

namespace {

int traverse_host(PyObject* object, visitproc visit, void* arg) {
  const auto* self = reinterpret_cast<HostKernel*>(object);
  Py_VISIT(Py_TYPE(object));
  for (const auto& [hash, entry] : *self->table)  // a record that several entries hold once
    if (const int stopped = entry->record && !entry->is_chosen ? entry->record->traverse(visit, arg) : 0)
      return stopped;
  if (const int stopped = self->constants->traverse(visit, arg)) return stopped;
  Py_VISIT(self->variants.dict);
  return self->state->traverse(visit, arg);
}

int clear_host(PyObject* object) {
  auto* self = reinterpret_cast<HostKernel*>(object);
  self->is_on = false;
  self->recent = nullptr;
  self->table->clear();
  self->state->clear();
  self->constants->clear();
  Py_CLEAR(self->variants.dict);
  return 0;
}

void drop_host(PyObject* object) {
  PyObject_GC_UnTrack(object);
  auto* self = reinterpret_cast<HostKernel*>(object);
  std::erase(host_kernels(), self);  // before anything runs Python
  clear_host(object);
  delete self->name;
  delete self->constants;
  delete self->state;
  delete self->counters;
  delete self->table;
  PyTypeObject* type = Py_TYPE(object);
  PyObject_GC_Del(object);
  Py_DECREF(type);
}

PyObject* reduce_host(PyObject*, PyObject*) {
  return Py_BuildValue("(O())", reinterpret_cast<PyObject*>(Py_TYPE(Py_None)));
}

}  // namespace

void make_host_kernel_type() {
  static PyMethodDef methods[] = {{"__reduce__", reduce_host, METH_NOARGS, nullptr}, {nullptr, nullptr, 0, nullptr}};
  static PyType_Slot slots[] = {{Py_tp_traverse, reinterpret_cast<void*>(&traverse_host)},
                                {Py_tp_clear, reinterpret_cast<void*>(&clear_host)},
                                {Py_tp_dealloc, reinterpret_cast<void*>(&drop_host)},
                                {Py_tp_methods, methods},
                                {0, nullptr}};
  static PyType_Spec spec = {"hdispatch._C.HostKernel", sizeof(HostKernel), 0,
                             Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION | Py_TPFLAGS_HAVE_GC, slots};
  host_kernel_type = PyType_FromSpec(&spec);
  if (!host_kernel_type) throw py::error_already_set();
}

HostKernel* make_host_kernel(PyObject* kernel, const std::string& name, PyObject* call_function, bool is_null) {
  auto* self = PyObject_GC_New(HostKernel, reinterpret_cast<PyTypeObject*>(host_kernel_type));
  if (!self) throw py::error_already_set();
  self->kernel = kernel;
  self->call_function = call_function;
  self->is_on = true;
  self->is_null = is_null;
  self->name = new std::string(name);
  self->constants = new KeyReader({}, true);
  self->state = new WatchedState;
  self->counters = new OpCounters;
  self->table = new HostTable;
  self->recent = nullptr;
  self->lonely = 0;
  self->variants = {};
  host_kernels().push_back(self);
  PyObject_GC_Track(reinterpret_cast<PyObject*>(self));
  return self;
}

}  // namespace hdispatch
