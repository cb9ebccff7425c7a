// adopted_patch.cpp -- `kernel[grid]`, `run` and a host kernel's `__call__`, as attributes of classes of Triton's and
// Helion's.
#include "adopted_patch.h"

#include <cxxabi.h>
#include <structmember.h>

#include <cstddef>
#include <vector>

#include "adopted_host.h"
#include "adopted_kernel.h"
#include "python_errors.h"

namespace py = pybind11;

namespace hdispatch {
namespace {

PyObject* launch_type;
PyObject* entry_name;  ///< of an adopted kernel in its kernel's dict

// ---- finding ----

/// The object that serves a kernel, borrowed; null if none does.
template <typename Adopted>
Adopted* find_entry(PyObject* kernel, PyObject* type) {
  PyObject* dict = PyObject_GenericGetDict(kernel, nullptr);
  if (HD_UNLIKELY(!dict)) return PyErr_Clear(), nullptr;
  PyObject* found = PyDict_GetItemWithError(dict, entry_name);
  Py_DECREF(dict);  // the kernel has it
  if (HD_UNLIKELY(!found || reinterpret_cast<PyObject*>(Py_TYPE(found)) != type)) return nullptr;
  auto* adopted = reinterpret_cast<Adopted*>(found);
  return HD_LIKELY(adopted->is_on && adopted->kernel == kernel) ? adopted : nullptr;
}

AdoptedKernel* find_adopted(PyObject* kernel) { return find_entry<AdoptedKernel>(kernel, adopted_type); }

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

/// What it holds may hold it: an object that keeps a launch whose grid is one of its methods.
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
  PyObject_GC_UnTrack(object);
  auto* self = reinterpret_cast<AdoptedLaunch*>(object);
  Py_CLEAR(self->grid);
  Py_DECREF(reinterpret_cast<PyObject*>(self->adopted));
  Py_CLEAR(self->kernel);
  if (spare_count < std::size(spare_launches)) {
    spare_launches[spare_count++] = self;  // with its reference to the type
    return;
  }
  PyTypeObject* type = Py_TYPE(object);
  PyObject_GC_Del(object);
  Py_DECREF(type);
}

/// There is none that clears one: whatever leads back to a launch was made after it, and can be cleared.
int traverse_launch(PyObject* object, visitproc visit, void* arg) {
  const auto* self = reinterpret_cast<const AdoptedLaunch*>(object);
  Py_VISIT(Py_TYPE(object));
  Py_VISIT(self->kernel);
  Py_VISIT(reinterpret_cast<PyObject*>(self->adopted));
  Py_VISIT(self->grid);
  return 0;
}

PyObject* make_launch(PyObject* kernel, AdoptedKernel* adopted, PyObject* grid) {
  AdoptedLaunch* made = nullptr;
  if (HD_LIKELY(spare_count)) {
    made = spare_launches[--spare_count];
    Py_SET_REFCNT(reinterpret_cast<PyObject*>(made), 1);
  } else {
    made = PyObject_GC_New(AdoptedLaunch, reinterpret_cast<PyTypeObject*>(launch_type));
    if (!made) return nullptr;
  }
  made->vectorcall = call_launch;
  made->kernel = Py_NewRef(kernel);
  Py_INCREF(reinterpret_cast<PyObject*>(adopted));
  made->adopted = adopted;
  made->grid = Py_NewRef(grid);
  PyObject_GC_Track(reinterpret_cast<PyObject*>(made));
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
  if (!done) throw_python_error();
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
    const Owned held{Py_NewRef(reinterpret_cast<PyObject*>(adopted))};
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
  auto* made = PyObject_New(AdoptedMethod, reinterpret_cast<PyTypeObject*>(patched_method_type));
  if (!made) throw_python_error();
  made->vectorcall = call;
  made->patch = patch;
  return reinterpret_cast<PyObject*>(made);
}

// ---- a host kernel's call ----

PyObject* call_host(PyObject* kernel, PyObject* args, PyObject* keywords) {
  return guarded([&]() -> PyObject* {
    for (const Patch* each : patches()) {
      if (!PyObject_TypeCheck(kernel, each->type)) continue;
      auto* found = find_entry<HostKernel>(kernel, host_kernel_type);
      if (HD_LIKELY(found != nullptr)) {
        const Owned held{Py_NewRef(reinterpret_cast<PyObject*>(found))};
        return found->call(args, keywords);
      }
      std::vector<PyObject*> all{kernel};
      for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(args); ++i) all.push_back(PyTuple_GET_ITEM(args, i));
      return PyObject_VectorcallDict(each->run, all.data(), all.size(), keywords);
    }
    PyErr_SetString(PyExc_TypeError, "hdispatch: a class with its slot was not patched");
    return nullptr;
  });
}

/// The same where it is looked up as an attribute.
PyObject* call_host_method(PyObject* callable, PyObject* const* args, size_t flags, PyObject* keyword_names) {
  const Patch& patch = *reinterpret_cast<const AdoptedMethod*>(callable)->patch;
  const Py_ssize_t positional = PyVectorcall_NARGS(flags);
  if (positional < 1 || !PyObject_TypeCheck(args[0], patch.type) || keyword_names)
    return PyObject_Vectorcall(patch.run, args, flags, keyword_names);
  const Owned packed{PyTuple_New(positional - 1)};
  if (!packed.object) return nullptr;
  for (Py_ssize_t i = 1; i < positional; ++i) PyTuple_SET_ITEM(packed.object, i - 1, Py_NewRef(args[i]));
  return call_host(args[0], packed.object, nullptr);
}

/// The attribute that a class had, or its base's.
void restore(const py::object& type, const char* name, PyObject* former) {
  if (former)
    type.attr(name) = py::handle(former);
  else
    py::delattr(type, name);
}

Patch* find_patch(const py::object& type) {
  auto* wanted = reinterpret_cast<PyTypeObject*>(type.ptr());
  for (Patch* each : patches())
    if (each->type == wanted) return each;
  patches().push_back(new Patch{wanted, nullptr, nullptr, false, false, nullptr});
  return patches().back();
}

}  // namespace

PyObject* patched_run(PyObject* kernel) {
  for (const Patch* each : patches())
    if (PyObject_TypeCheck(kernel, each->type)) return each->run;
  return nullptr;
}

void patch_host_class(const py::object& type) {
  Patch* patch = find_patch(type);
  auto* wanted = patch->type;
  const auto dict = py::reinterpret_borrow<py::dict>(wanted->tp_dict);
  if (dict.contains("__call__") && reinterpret_cast<PyObject*>(Py_TYPE(dict["__call__"].ptr())) == patched_method_type)
    return;
  patch->run = py::object(type.attr("__call__")).release().ptr();
  type.attr("__call__") = py::reinterpret_steal<py::object>(make_method(patch, call_host_method));
  wanted->tp_call = call_host;  // until somebody else assigns the class's __call__
}

void unpatch_host_class(const py::object& type) {
  const Patch* patch = find_patch(type);
  const auto dict = py::reinterpret_borrow<py::dict>(patch->type->tp_dict);
  if (!patch->run || reinterpret_cast<PyObject*>(Py_TYPE(dict["__call__"].ptr())) != patched_method_type) return;
  type.attr("__call__") = py::handle(patch->run);
}

/// Puts our attributes on a class. `adopt` as in Patch. Again: only sets `adopt`.
void patch_class(const py::object& type, const py::object& adopt) {
  Patch* patch = find_patch(type);
  auto* wanted = patch->type;
  Py_XSETREF(patch->adopt, adopt.is_none() ? nullptr : adopt.inc_ref().ptr());
  const auto dict = py::reinterpret_borrow<py::dict>(wanted->tp_dict);
  if (dict.contains("run") && reinterpret_cast<PyObject*>(Py_TYPE(dict["run"].ptr())) == patched_method_type) return;
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
      if (!dict.contains(name) || reinterpret_cast<PyObject*>(Py_TYPE(dict[name].ptr())) != patched_method_type)
        return false;
    restore(type, "__getitem__", each->own_getitem ? each->getitem : nullptr);
    restore(type, "run", each->own_run ? each->run : nullptr);
  }
  return true;
}

/// Makes the Python types; once, at import.
void make_patch_types() {
  static PyMemberDef launch_members[] = {
      {"__vectorcalloffset__", T_PYSSIZET, offsetof(AdoptedLaunch, vectorcall), READONLY, nullptr},
      {nullptr, 0, 0, 0, nullptr}};
  static PyMemberDef method_members[] = {
      {"__vectorcalloffset__", T_PYSSIZET, offsetof(AdoptedMethod, vectorcall), READONLY, nullptr},
      {nullptr, 0, 0, 0, nullptr}};
  PyType_Slot launch_slots[] = {{Py_tp_call, reinterpret_cast<void*>(&PyVectorcall_Call)},
                                {Py_tp_members, launch_members},
                                {Py_tp_traverse, reinterpret_cast<void*>(&traverse_launch)},
                                {Py_tp_dealloc, reinterpret_cast<void*>(&drop_launch)},
                                {0, nullptr}};
  PyType_Slot method_slots[] = {{Py_tp_call, reinterpret_cast<void*>(&PyVectorcall_Call)},
                                {Py_tp_members, method_members},
                                {Py_tp_descr_get, reinterpret_cast<void*>(&bind_method)},
                                {0, nullptr}};
  constexpr unsigned kFlags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION | Py_TPFLAGS_HAVE_VECTORCALL;
  PyType_Spec launch = {"hdispatch._C.AdoptedLaunch", sizeof(AdoptedLaunch), 0,
                        static_cast<unsigned>(kFlags | Py_TPFLAGS_HAVE_GC), launch_slots};
  PyType_Spec method = {"hdispatch._C.AdoptedMethod", sizeof(AdoptedMethod), 0,
                        static_cast<unsigned>(kFlags | Py_TPFLAGS_METHOD_DESCRIPTOR), method_slots};
  launch_type = PyType_FromSpec(&launch);
  patched_method_type = PyType_FromSpec(&method);
  if (!launch_type || !patched_method_type) throw py::error_already_set();
  entry_name = PyUnicode_InternFromString("_hdispatch_adopted");
}

}  // namespace hdispatch
