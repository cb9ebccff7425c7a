// adopted_door.cpp -- the types of adopted kernels, of their launches and of the patched attributes.
#include "adopted_door.h"

#include <cxxabi.h>
#include <pybind11/stl.h>
#include <structmember.h>
#include <torch/csrc/Exceptions.h>

#include <cstddef>

#include "adopted_kernel.h"
#include "op_call.h"

namespace py = pybind11;

namespace hdispatch {
namespace {

PyObject* launch_type;
PyObject* method_type;
PyObject* entry_name;  ///< of an adopted kernel in its kernel's dict

// ---- finding ----

/// The adopted kernel of a Triton kernel, borrowed; null if it has none that serves.
AdoptedKernel* find_adopted(PyObject* kernel) {
  PyObject* dict = PyObject_GenericGetDict(kernel, nullptr);
  if (HD_UNLIKELY(!dict)) return PyErr_Clear(), nullptr;
  PyObject* found = PyDict_GetItemWithError(dict, entry_name);
  Py_DECREF(dict);  // the kernel has it
  if (HD_UNLIKELY(!found || reinterpret_cast<PyObject*>(Py_TYPE(found)) != adopted_type)) return nullptr;
  auto* adopted = reinterpret_cast<AdoptedKernel*>(found);
  return HD_LIKELY(adopted->is_on && adopted->kernel == kernel) ? adopted : nullptr;
}

/// Runs what may throw at a door.
template <typename Call>
PyObject* guarded(const Call& call) {
  try {
    return call();
  } catch (abi::__forced_unwind&) {
    throw;
  } catch (...) {
    set_python_error();
    return nullptr;
  }
}

// ---- kernel[grid] ----

struct AdoptedLaunch {
  PyObject_HEAD vectorcallfunc vectorcall;
  PyObject* kernel;
  AdoptedKernel* adopted;
  PyObject* grid;
};

/// Launches that nobody holds any more, to be used again: an allocation less per call. Under the GIL.
AdoptedLaunch* spare_launches[8];
size_t spare_count;

PyObject* call_launch(PyObject* callable, PyObject* const* args, size_t flags, PyObject* keyword_names) {
  const auto* self = reinterpret_cast<const AdoptedLaunch*>(callable);
  const auto positional = static_cast<size_t>(PyVectorcall_NARGS(flags));
  return guarded([&] { return self->adopted->call(self->grid, args, positional, keyword_names); });
}

void drop_launch(PyObject* object) {
  auto* self = reinterpret_cast<AdoptedLaunch*>(object);
  Py_CLEAR(self->grid);
  Py_DECREF(reinterpret_cast<PyObject*>(self->adopted));
  Py_CLEAR(self->kernel);
  if (spare_count < std::size(spare_launches)) {
    spare_launches[spare_count++] = self;  // with its reference to the type
    return;
  }
  PyTypeObject* type = Py_TYPE(object);
  PyObject_Free(object);
  Py_DECREF(type);
}

PyObject* make_launch(PyObject* kernel, AdoptedKernel* adopted, PyObject* grid) {
  AdoptedLaunch* made = nullptr;
  if (HD_LIKELY(spare_count)) {
    made = spare_launches[--spare_count];
    Py_SET_REFCNT(reinterpret_cast<PyObject*>(made), 1);
  } else {
    made = PyObject_New(AdoptedLaunch, reinterpret_cast<PyTypeObject*>(launch_type));
    if (!made) return nullptr;
  }
  made->vectorcall = call_launch;
  made->kernel = Py_NewRef(kernel);
  Py_INCREF(reinterpret_cast<PyObject*>(adopted));
  made->adopted = adopted;
  made->grid = Py_NewRef(grid);
  return reinterpret_cast<PyObject*>(made);
}

// ---- the patched attributes ----

/// What a class had before; one per patched class, never freed: a call may be in it.
struct Patch {
  PyTypeObject* type;
  PyObject* getitem;
  PyObject* run;
  bool own_getitem;  ///< not a base's
  bool own_run;
  PyObject* adopt;  ///< callable(kernel) for kernels that are not adopted yet; null or None: they stay Triton's
};
std::vector<Patch*>& patches() {
  static auto* made = new std::vector<Patch*>;
  return *made;
}

/// An attribute of ours on a class of Triton's: a method, called with the kernel in front.
struct AdoptedMethod {
  PyObject_HEAD vectorcallfunc vectorcall;
  Patch* patch;
};

/// The adopted kernel, made now where all kernels of the process are adopted.
AdoptedKernel* find_or_adopt(const Patch& patch, PyObject* kernel) {
  AdoptedKernel* found = find_adopted(kernel);
  if (HD_LIKELY(found != nullptr) || !patch.adopt) return found;
  PyObject* done = PyObject_CallOneArg(patch.adopt, kernel);
  if (!done) throw python_error();
  Py_DECREF(done);
  return find_adopted(kernel);
}

PyObject* get_launch(const Patch& patch, PyObject* kernel, PyObject* grid) {
  return guarded([&]() -> PyObject* {
    AdoptedKernel* adopted = find_or_adopt(patch, kernel);
    if (HD_LIKELY(adopted != nullptr)) return make_launch(kernel, adopted, grid);
    return PyObject_CallFunctionObjArgs(patch.getitem, kernel, grid, nullptr);
  });
}

PyObject* call_getitem(PyObject* callable, PyObject* const* args, size_t flags, PyObject* keyword_names) {
  const Patch& patch = *reinterpret_cast<const AdoptedMethod*>(callable)->patch;
  if (PyVectorcall_NARGS(flags) != 2 || keyword_names || !PyObject_TypeCheck(args[0], patch.type))
    return PyObject_Vectorcall(patch.getitem, args, flags, keyword_names);
  return get_launch(patch, args[0], args[1]);
}

PyObject* call_run(PyObject* callable, PyObject* const* args, size_t flags, PyObject* keyword_names) {
  const Patch& patch = *reinterpret_cast<const AdoptedMethod*>(callable)->patch;
  const auto positional = static_cast<size_t>(PyVectorcall_NARGS(flags));
  if (HD_UNLIKELY(positional < 1 || !PyObject_TypeCheck(args[0], patch.type)))
    return PyObject_Vectorcall(patch.run, args, flags, keyword_names);
  return guarded([&]() -> PyObject* {
    AdoptedKernel* adopted = find_or_adopt(patch, args[0]);
    if (HD_UNLIKELY(!adopted)) return PyObject_Vectorcall(patch.run, args, flags, keyword_names);
    return adopted->call(nullptr, args + 1, positional - 1, keyword_names);
  });
}

PyObject* bind_method(PyObject* self, PyObject* object, PyObject*) {
  return object && object != Py_None ? PyMethod_New(self, object) : Py_NewRef(self);
}

/// The C slot of a patched class: `kernel[grid]` without a look at the class's dict.
PyObject* subscript(PyObject* kernel, PyObject* grid) {
  for (const Patch* each : patches())
    if (HD_LIKELY(PyObject_TypeCheck(kernel, each->type))) return get_launch(*each, kernel, grid);
  PyErr_SetString(PyExc_TypeError, "hdispatch: a class with its slot was not patched");
  return nullptr;
}

PyObject* make_method(Patch* patch, vectorcallfunc call) {
  auto* made = PyObject_New(AdoptedMethod, reinterpret_cast<PyTypeObject*>(method_type));
  if (!made) throw python_error();
  made->vectorcall = call;
  made->patch = patch;
  return reinterpret_cast<PyObject*>(made);
}

/// The attribute that a class had, or its base's.
void restore(const py::object& type, const char* name, PyObject* former) {
  if (former)
    type.attr(name) = py::handle(former);
  else
    py::delattr(type, name);
}

/// Puts our attributes on a class. `adopt` as in Patch. Again: only sets `adopt`.
void patch_class(const py::object& type, const py::object& adopt) {
  auto* wanted = reinterpret_cast<PyTypeObject*>(type.ptr());
  Patch* patch = nullptr;
  for (Patch* each : patches())
    if (each->type == wanted) patch = each;
  if (!patch) {
    patch = new Patch{wanted, nullptr, nullptr, false, false, nullptr};
    patches().push_back(patch);
  }
  Py_XSETREF(patch->adopt, adopt.is_none() ? nullptr : adopt.inc_ref().ptr());
  const auto dict = py::reinterpret_borrow<py::dict>(wanted->tp_dict);
  if (dict.contains("run") && reinterpret_cast<PyObject*>(Py_TYPE(dict["run"].ptr())) == method_type) return;
  patch->getitem = py::object(type.attr("__getitem__")).release().ptr();
  patch->run = py::object(type.attr("run")).release().ptr();
  patch->own_getitem = dict.contains("__getitem__");
  patch->own_run = dict.contains("run");
  type.attr("__getitem__") = py::reinterpret_steal<py::object>(make_method(patch, call_getitem));
  type.attr("run") = py::reinterpret_steal<py::object>(make_method(patch, call_run));
  wanted->tp_as_mapping->mp_subscript = subscript;  // until somebody else assigns the class's __getitem__
}

/// Takes our attributes off again; false if somebody has put others over them, which then stay and lead to ours.
bool unpatch_class(const py::object& type) {
  auto* wanted = reinterpret_cast<PyTypeObject*>(type.ptr());
  for (Patch* each : patches()) {
    if (each->type != wanted) continue;
    Py_CLEAR(each->adopt);
    const auto dict = py::reinterpret_borrow<py::dict>(wanted->tp_dict);
    for (const char* name : {"__getitem__", "run"})
      if (!dict.contains(name) || reinterpret_cast<PyObject*>(Py_TYPE(dict[name].ptr())) != method_type) return false;
    restore(type, "__getitem__", each->own_getitem ? each->getitem : nullptr);
    restore(type, "run", each->own_run ? each->run : nullptr);
  }
  return true;
}

// ---- the adopted kernel's own type ----

std::vector<AdoptedKernel*>& alive() {
  static auto* made = new std::vector<AdoptedKernel*>;
  return *made;
}

int traverse_adopted(PyObject* object, visitproc visit, void* arg) {
  const auto* self = reinterpret_cast<AdoptedKernel*>(object);
  Py_VISIT(Py_TYPE(object));
  Py_VISIT(self->run);
  Py_VISIT(self->tuner_cache);
  for (const AdoptedHeuristic& each : *self->heuristics) Py_VISIT(each.function);
  for (const auto& entry : self->table->entries()) {
    Py_VISIT(entry->compiled);
    Py_VISIT(entry->constants);
    Py_VISIT(entry->config);
  }
  if (const int stopped = self->reader->traverse(visit, arg)) return stopped;
  if (const int stopped = self->programs->traverse(visit, arg)) return stopped;
  return self->state->traverse(visit, arg);
}

int clear_adopted(PyObject* object) {
  auto* self = reinterpret_cast<AdoptedKernel*>(object);
  self->is_on = false;
  self->best_config = nullptr;
  self->table->clear();
  self->state->clear();
  self->reader->clear();
  self->programs->clear();
  Py_CLEAR(self->tuner_cache);
  for (AdoptedHeuristic& each : *self->heuristics) {
    Py_CLEAR(each.function);
    Py_CLEAR(each.name);
  }
  self->heuristics->clear();
  return 0;
}

void drop_adopted(PyObject* object) {
  PyObject_GC_UnTrack(object);
  clear_adopted(object);
  auto* self = reinterpret_cast<AdoptedKernel*>(object);
  std::erase(alive(), self);
  Py_CLEAR(self->run);
  delete self->name;
  delete self->reader;
  delete self->state;
  delete self->table;
  delete self->programs;
  delete self->heuristics;
  delete self->counters;
  PyTypeObject* type = Py_TYPE(object);
  PyObject_GC_Del(object);
  Py_DECREF(type);
}

/// A copy of the kernel's dict, pickled or deeply copied, has None in its place: it adopts again.
PyObject* reduce_adopted(PyObject*, PyObject*) {
  return Py_BuildValue("(O())", reinterpret_cast<PyObject*>(Py_TYPE(Py_None)));
}

PyObject* make_type(const char* name, size_t size, unsigned long flags, PyType_Slot* slots) {
  PyType_Spec spec = {name, static_cast<int>(size), 0,
                      static_cast<unsigned>(Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION | flags), slots};
  PyObject* made = PyType_FromSpec(&spec);
  if (!made) throw py::error_already_set();
  return made;
}

template <typename Function>
void* slot_of_function(Function* function) {
  return reinterpret_cast<void*>(function);
}

void make_types() {
  static PyMemberDef launch_members[] = {
      {"__vectorcalloffset__", T_PYSSIZET, offsetof(AdoptedLaunch, vectorcall), READONLY, nullptr},
      {nullptr, 0, 0, 0, nullptr}};
  static PyMemberDef method_members[] = {
      {"__vectorcalloffset__", T_PYSSIZET, offsetof(AdoptedMethod, vectorcall), READONLY, nullptr},
      {nullptr, 0, 0, 0, nullptr}};
  static PyMethodDef adopted_methods[] = {{"__reduce__", reduce_adopted, METH_NOARGS, nullptr},
                                          {nullptr, nullptr, 0, nullptr}};
  PyType_Slot launch_slots[] = {{Py_tp_call, slot_of_function(&PyVectorcall_Call)},
                                {Py_tp_members, launch_members},
                                {Py_tp_dealloc, slot_of_function(&drop_launch)},
                                {0, nullptr}};
  PyType_Slot method_slots[] = {{Py_tp_call, slot_of_function(&PyVectorcall_Call)},
                                {Py_tp_members, method_members},
                                {Py_tp_descr_get, slot_of_function(&bind_method)},
                                {0, nullptr}};
  PyType_Slot adopted_slots[] = {{Py_tp_traverse, slot_of_function(&traverse_adopted)},
                                 {Py_tp_clear, slot_of_function(&clear_adopted)},
                                 {Py_tp_dealloc, slot_of_function(&drop_adopted)},
                                 {Py_tp_methods, adopted_methods},
                                 {0, nullptr}};
  launch_type =
      make_type("hdispatch._C.AdoptedLaunch", sizeof(AdoptedLaunch), Py_TPFLAGS_HAVE_VECTORCALL, launch_slots);
  method_type = make_type("hdispatch._C.AdoptedMethod", sizeof(AdoptedMethod),
                          Py_TPFLAGS_HAVE_VECTORCALL | Py_TPFLAGS_METHOD_DESCRIPTOR, method_slots);
  adopted_type = make_type("hdispatch._C.AdoptedKernel", sizeof(AdoptedKernel), Py_TPFLAGS_HAVE_GC, adopted_slots);
}

AdoptedKernel& as_adopted(const py::object& object) {
  if (reinterpret_cast<PyObject*>(Py_TYPE(object.ptr())) != adopted_type)
    throw py::type_error("expected an adopted kernel, got " + std::string(py::str(py::type::handle_of(object))));
  return *reinterpret_cast<AdoptedKernel*>(object.ptr());
}

/// `parameters`: (name, has default, default, is_constexpr, specialize, align, is_exact). `heuristics`: (name,
/// function).
py::object make_adopted(const py::object& kernel, const std::string& name, const py::list& parameters, bool is_null,
                        bool may_lack, const py::list& heuristics, const py::object& tuner,
                        const py::object& tuner_cache) {
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
  auto* self = PyObject_GC_New(AdoptedKernel, reinterpret_cast<PyTypeObject*>(adopted_type));
  if (!self) throw py::error_already_set();
  self->kernel = kernel.ptr();
  self->run = nullptr;
  for (const Patch* each : patches())
    if (PyObject_TypeCheck(kernel.ptr(), each->type)) self->run = Py_NewRef(each->run);
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
  self->tuner = tuner.is_none() ? nullptr : tuner.ptr();
  self->tuner_cache = tuner_cache.is_none() ? nullptr : tuner_cache.inc_ref().ptr();
  self->best_config = nullptr;
  alive().push_back(self);
  PyObject_GC_Track(reinterpret_cast<PyObject*>(self));
  return py::reinterpret_steal<py::object>(reinterpret_cast<PyObject*>(self));
}

}  // namespace

std::vector<std::pair<std::string, OpCounters*>> adopted_counters() {
  std::vector<std::pair<std::string, OpCounters*>> out;
  for (AdoptedKernel* each : alive()) out.emplace_back(*each->name, each->counters);
  return out;
}

void define_adopted(py::module_& m) {
  make_types();
  entry_name = PyUnicode_InternFromString("_hdispatch_adopted");
  m.def(
      "set_adopted_callbacks",
      [](const py::object& process_state, const py::object& kernel_state, const py::object& learn,
         const py::object& trace, const py::object& constexpr_type, const py::object& function_type, int device_count) {
        adopted_callbacks = {process_state.inc_ref().ptr(), kernel_state.inc_ref().ptr(), learn.inc_ref().ptr(),
                             trace.inc_ref().ptr()};
        KeyReader::set_constant_types(constexpr_type.ptr(), function_type.ptr());
        set_adopted_device_count(device_count);
      },
      py::arg("process_state"), py::arg("kernel_state"), py::arg("learn"), py::arg("trace"), py::arg("constexpr_type"),
      py::arg("function_type"), py::arg("device_count"));
  m.def("make_adopted", &make_adopted, py::arg("kernel"), py::arg("name"), py::arg("parameters"), py::arg("is_null"),
        py::arg("may_lack"), py::arg("heuristics"), py::arg("tuner"), py::arg("tuner_cache"));
  m.def("patch_class", &patch_class, py::arg("type"), py::arg("adopt"));
  m.def("unpatch_class", &unpatch_class, py::arg("type"));
  m.attr("AdoptedKernel") = py::reinterpret_borrow<py::object>(adopted_type);
  m.def("adopted_kernels", [] {
    py::list out;
    for (AdoptedKernel* each : alive())
      out.append(py::reinterpret_borrow<py::object>(reinterpret_cast<PyObject*>(each)));
    return out;
  });
  m.def("switch_adopted", [](const py::object& object, bool on) { as_adopted(object).is_on = on; });
  m.def("adopted_is_on", [](const py::object& object) { return as_adopted(object).is_on; });
  m.def("adopted_keys", [](const py::object& object) {
    py::list out;
    for (const auto& entry : as_adopted(object).table->entries())
      out.append(py::make_tuple(entry->words, entry->row ? entry->row->describe() : entry->reason,
                                py::reinterpret_borrow<py::object>(entry->compiled)));
    return out;
  });
}

}  // namespace hdispatch
