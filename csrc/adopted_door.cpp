// adopted_door.cpp -- the Python type of adopted kernels, and what the module has for making and asking them.
#include "adopted_door.h"

#include <cxxabi.h>
#include <pybind11/stl.h>
#include <structmember.h>

#include <cstddef>

#include "adopted_host.h"
#include "adopted_kernel.h"
#include "adopted_patch.h"

namespace py = pybind11;

namespace hdispatch {
namespace {

// ---- the adopted kernel's own type ----

std::vector<AdoptedKernel*>& alive() {
  static auto* made = new std::vector<AdoptedKernel*>;
  return *made;
}

int traverse_adopted(PyObject* object, visitproc visit, void* arg) {
  const auto* self = reinterpret_cast<AdoptedKernel*>(object);
  Py_VISIT(Py_TYPE(object));
  Py_VISIT(self->run);
  for (const AdoptedHeuristic& each : *self->heuristics) Py_VISIT(each.function);
  for (const auto& last : self->table->entries())
    for (const AdoptedEntry* entry = last.get(); entry; entry = entry->former.get()) {
      Py_VISIT(entry->compiled);
      Py_VISIT(entry->constants);
      Py_VISIT(entry->config);
      for (const WatchedDict& each : entry->config_state) Py_VISIT(each.dict);
    }
  if (const int stopped = self->tuner ? self->tuner->traverse(visit, arg) : 0) return stopped;
  if (const int stopped = self->reader->traverse(visit, arg)) return stopped;
  if (const int stopped = self->programs->traverse(visit, arg)) return stopped;
  return self->state->traverse(visit, arg);
}

int clear_adopted(PyObject* object) {
  auto* self = reinterpret_cast<AdoptedKernel*>(object);
  self->is_on = false;
  if (self->tuner) self->tuner->clear();
  self->table->clear();
  self->state->clear();
  self->reader->clear();
  self->programs->clear();
  for (AdoptedHeuristic& each : *self->heuristics) {
    Py_CLEAR(each.function);
    Py_CLEAR(each.name);
  }
  self->heuristics->clear();
  return 0;
}

void drop_adopted(PyObject* object) {
  PyObject_GC_UnTrack(object);
  auto* self = reinterpret_cast<AdoptedKernel*>(object);
  std::erase(alive(), self);  // before anything runs Python
  clear_adopted(object);
  Py_CLEAR(self->run);
  delete self->name;
  delete self->reader;
  delete self->state;
  delete self->table;
  delete self->programs;
  delete self->heuristics;
  delete self->counters;
  delete self->tuner;
  delete self->refusal;
  PyTypeObject* type = Py_TYPE(object);
  PyObject_GC_Del(object);
  Py_DECREF(type);
}

/// A copy of the kernel's dict, pickled or deeply copied, has None in its place: it adopts again.
PyObject* reduce_adopted(PyObject*, PyObject*) {
  return Py_BuildValue("(O())", reinterpret_cast<PyObject*>(Py_TYPE(Py_None)));
}

void make_adopted_type() {
  static PyMethodDef methods[] = {{"__reduce__", reduce_adopted, METH_NOARGS, nullptr}, {nullptr, nullptr, 0, nullptr}};
  PyType_Slot slots[] = {{Py_tp_traverse, reinterpret_cast<void*>(&traverse_adopted)},
                         {Py_tp_clear, reinterpret_cast<void*>(&clear_adopted)},
                         {Py_tp_dealloc, reinterpret_cast<void*>(&drop_adopted)},
                         {Py_tp_methods, methods},
                         {0, nullptr}};
  PyType_Spec spec = {"hdispatch._C.AdoptedKernel", sizeof(AdoptedKernel), 0,
                      Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION | Py_TPFLAGS_HAVE_GC, slots};
  adopted_type = PyType_FromSpec(&spec);
  if (!adopted_type) throw py::error_already_set();
}

AdoptedKernel& as_adopted(const py::object& object) {
  if (reinterpret_cast<PyObject*>(Py_TYPE(object.ptr())) != adopted_type)
    throw py::type_error("expected an adopted kernel, got " + std::string(py::str(py::type::handle_of(object))));
  return *reinterpret_cast<AdoptedKernel*>(object.ptr());
}

bool& is_on(const py::object& object) {
  if (reinterpret_cast<PyObject*>(Py_TYPE(object.ptr())) == host_kernel_type)
    return reinterpret_cast<HostKernel*>(object.ptr())->is_on;
  return as_adopted(object).is_on;
}

/// `parameters`: (name, has default, default, is_constexpr, specialize, align, is_exact). `heuristics`: (name,
/// function). `refusal`: why every call stays Triton's, or "".
py::object make_adopted(const py::object& kernel, const std::string& name, const py::list& parameters, bool is_null,
                        bool may_lack, const py::list& heuristics, const py::object& tuner,
                        const std::string& refusal) {
  std::vector<AdoptedParameter> made;
  for (const auto& item : parameters) {
    const auto each = item.cast<py::tuple>();
    AdoptedParameter parameter{each[0].ptr(), each[1].cast<bool>() ? py::object(each[2]).ptr() : nullptr};
    parameter.is_constexpr = each[3].cast<bool>();
    parameter.specialize = each[4].cast<bool>();
    parameter.align = each[5].cast<bool>();
    parameter.is_exact = each[6].cast<bool>();
    made.push_back(parameter);
  }
  std::vector<AdoptedHeuristic> computed;
  for (const auto& item : heuristics) {
    const auto each = item.cast<py::tuple>();
    int index = -1;
    for (size_t i = 0; i < made.size(); ++i)
      if (PyUnicode_Compare(made[i].name, py::object(each[0]).ptr()) == 0) index = static_cast<int>(i);
    computed.push_back({index, py::object(each[0]).inc_ref().ptr(), py::object(each[1]).inc_ref().ptr()});
  }
  auto watched = tuner.is_none() ? nullptr : std::make_unique<AdoptedTuner>(tuner.ptr());
  auto* self = PyObject_GC_New(AdoptedKernel, reinterpret_cast<PyTypeObject*>(adopted_type));
  if (!self) throw py::error_already_set();
  self->kernel = kernel.ptr();
  self->run = Py_XNewRef(patched_run(kernel.ptr()));
  if (!self->run) fail(Fault::kInternal, name, ": its class is not patched");
  self->is_on = true;
  self->is_null = is_null;
  self->name = new std::string(name);
  self->reader = new KeyReader(std::move(made), may_lack);
  self->state = new WatchedState;
  self->table = new AdoptedTable;
  self->programs = new HostPrograms;
  self->heuristics = new std::vector<AdoptedHeuristic>(std::move(computed));
  self->counters = new OpCounters;
  self->tuner = watched.release();
  self->refusal = refusal.empty() ? nullptr : new std::string(refusal);
  alive().push_back(self);
  PyObject_GC_Track(reinterpret_cast<PyObject*>(self));
  return py::reinterpret_steal<py::object>(reinterpret_cast<PyObject*>(self));
}

}  // namespace

/// Held: making Python objects may run the collector, which frees kernels.
std::vector<py::object> adopted_objects() {
  std::vector<py::object> out;
  out.reserve(alive().size() + host_kernels().size());
  for (HostKernel* each : host_kernels())
    out.push_back(py::reinterpret_borrow<py::object>(reinterpret_cast<PyObject*>(each)));
  for (AdoptedKernel* each : alive())
    out.push_back(py::reinterpret_borrow<py::object>(reinterpret_cast<PyObject*>(each)));
  return out;
}

std::pair<const std::string*, OpCounters*> adopted_counters(const py::object& adopted) {
  if (reinterpret_cast<PyObject*>(Py_TYPE(adopted.ptr())) == host_kernel_type) {
    const auto* host = reinterpret_cast<HostKernel*>(adopted.ptr());
    return {host->name, host->counters};
  }
  return {as_adopted(adopted).name, as_adopted(adopted).counters};
}

namespace {

/// What C++ asks Python for when a key is new; kept for ever.
void define_callbacks(py::module_& m) {
  m.def(
      "set_adopted_callbacks",
      [](const py::object& process_state, const py::object& kernel_state, const py::object& choice,
         const py::object& learn, const py::object& trace, const py::object& constexpr_type,
         const py::object& function_type, int device_count) {
        adopted_callbacks.process_state = process_state.inc_ref().ptr();
        adopted_callbacks.kernel_state = kernel_state.inc_ref().ptr();
        adopted_callbacks.choice = choice.inc_ref().ptr();
        adopted_callbacks.learn = learn.inc_ref().ptr();
        adopted_callbacks.trace = trace.inc_ref().ptr();
        KeyReader::set_constant_types(constexpr_type.ptr(), function_type.ptr());
        set_adopted_device_count(device_count);
      },
      py::arg("process_state"), py::arg("kernel_state"), py::arg("choice"), py::arg("learn"), py::arg("trace"),
      py::arg("constexpr_type"), py::arg("function_type"), py::arg("device_count"));
  m.def(
      "set_host_callbacks",
      [](const py::object& state, const py::object& record, const py::object& choice, const py::object& launches) {
        adopted_callbacks.host_state = state.inc_ref().ptr();
        adopted_callbacks.host_record = record.inc_ref().ptr();
        adopted_callbacks.host_choice = choice.inc_ref().ptr();
        adopted_callbacks.host_launches = launches.inc_ref().ptr();
      },
      py::arg("state"), py::arg("record"), py::arg("choice"), py::arg("launches"));
}

/// Adopted kernels: making them, switching them, which there are.
void define_kernels(py::module_& m) {
  m.def("make_adopted", &make_adopted, py::arg("kernel"), py::arg("name"), py::arg("parameters"), py::arg("is_null"),
        py::arg("may_lack"), py::arg("heuristics"), py::arg("tuner"), py::arg("refusal"));
  m.def(
      "make_host_kernel",
      [](const py::object& kernel, const std::string& name, bool is_null) {
        PyObject* call = patched_run(kernel.ptr());
        if (!call) fail(Fault::kInternal, name, ": its class is not patched");
        return py::reinterpret_steal<py::object>(
            reinterpret_cast<PyObject*>(make_host_kernel(kernel.ptr(), name, call, is_null)));
      },
      py::arg("kernel"), py::arg("name"), py::arg("is_null"));
  m.attr("HostKernel") = py::reinterpret_borrow<py::object>(host_kernel_type);
  m.attr("AdoptedKernel") = py::reinterpret_borrow<py::object>(adopted_type);
  m.def("adopted_kernels", [] {
    py::list out;
    for (const py::object& each : adopted_objects()) out.append(each);
    return out;
  });
  m.def(
      "switch_adopted", [](const py::object& adopted, bool on) { is_on(adopted) = on; }, py::arg("adopted"),
      py::arg("on"));
  m.def(
      "adopted_is_of",
      [](const py::object& adopted, const py::object& kernel) {
        if (reinterpret_cast<PyObject*>(Py_TYPE(adopted.ptr())) == host_kernel_type)
          return reinterpret_cast<HostKernel*>(adopted.ptr())->kernel == kernel.ptr();
        return as_adopted(adopted).kernel == kernel.ptr();
      },
      py::arg("adopted"), py::arg("kernel"));
  m.def("adopted_is_on", [](const py::object& adopted) { return is_on(adopted); }, py::arg("adopted"));
}

/// Attributes of ours on other people's classes.
void define_patches(py::module_& m) {
  m.def("patch_host_class", &patch_host_class, py::arg("type"));
  m.def("unpatch_host_class", &unpatch_host_class, py::arg("type"));
  m.def("patch_class", &patch_class, py::arg("type"), py::arg("adopt"));
  m.def("unpatch_class", &unpatch_class, py::arg("type"));
  m.def(  // read alone: to see by its version that somebody put other attributes over ours
      "class_dict",
      [](const py::type& type) {
        return py::reinterpret_borrow<py::dict>(reinterpret_cast<PyTypeObject*>(type.ptr())->tp_dict);
      },
      py::arg("type"));
  m.def(  // on an object of a patched class; no kernel of ours is looked for
      "call_unpatched_run", [](const py::object& kernel, const py::args& args, const py::kwargs& keywords) {
        PyObject* run = patched_run(kernel.ptr());
        if (!run) fail(Fault::kInternal, "class ", Py_TYPE(kernel.ptr())->tp_name, " is not patched");
        return py::reinterpret_borrow<py::object>(run)(kernel, *args, **keywords);
      });
  m.attr("AdoptedMethod") = py::reinterpret_borrow<py::object>(patched_method_type);
}

/// What a kernel knows of its calls, and what one costs.
void define_adopted_keys(py::module_& m) {
  m.def(
      "bench_adopted_ns",
      [](const py::object& object, const py::tuple& args, const std::array<uint32_t, 3>& grid, uint32_t count) {
        std::vector<PyObject*> given;
        for (const auto& arg : args) given.push_back(arg.ptr());
        return as_adopted(object).bench_ns(given.data(), given.size(), grid, count);
      },
      py::arg("adopted"), py::arg("args"), py::arg("grid"), py::arg("count"));
  m.def(
      "host_keys",
      [](const py::object& adopted) {
        py::list out;  // (whether there is a record, whether it is one shape's, why there is none or only that)
        if (reinterpret_cast<PyObject*>(Py_TYPE(adopted.ptr())) != host_kernel_type) return out;
        std::vector<std::tuple<bool, bool, std::string>> found;  // first: making objects may run the collector
        for (const auto& [hash, entry] : *reinterpret_cast<HostKernel*>(adopted.ptr())->table)
          if (!entry->is_chosen)
            found.emplace_back(entry->record != nullptr, !entry->record || entry->record->is_exact(), entry->reason);
        for (const auto& [served, exact, reason] : found) out.append(py::make_tuple(served, exact, reason));
        return out;
      },
      py::arg("adopted"));
  m.def(
      "adopted_keys",
      [](const py::object& adopted) {
        py::list out;
        const auto& entries = as_adopted(adopted).table->entries();
        for (size_t i = 0; i < entries.size(); ++i) {  // it may grow meanwhile
          const AdoptedEntry& entry = *entries[i];
          out.append(py::make_tuple(entry.words, entry.row ? entry.row->describe() : entry.reason,
                                    py::reinterpret_borrow<py::object>(entry.compiled)));
        }
        return out;
      },
      py::arg("adopted"));
}

}  // namespace

void define_adopted(py::module_& m) {
  make_adopted_type();
  make_host_kernel_type();
  make_patch_types();
  define_callbacks(m);
  define_kernels(m);
  define_patches(m);
  define_adopted_keys(m);
}

}  // namespace hdispatch
