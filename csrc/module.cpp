// module.cpp -- pybind11: defining ops, building tables, strict mode, stats, explain. Nothing hot.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>

#include "adopted_door.h"
#include "attempt.h"
#include "bench.h"
#include "empty_tensor.h"
#include "from_python.h"
#include "functional_op.h"
#include "op_arguments.h"
#include "op_call.h"
#include "override.h"
#include "python_errors.h"
#include "sequence_call.h"
#include "strict_mode.h"
#include "torch_layout.h"

namespace py = pybind11;

namespace hdispatch {
namespace {

PyObject* op_type;          // owned; made at import
PyObject* functional_type;  // likewise
PyObject* sequence_type;    // likewise

const OpObject& as_op(const py::handle& object) {
  if (Py_TYPE(object.ptr()) != reinterpret_cast<PyTypeObject*>(op_type))
    throw py::type_error("expected an hdispatch op, got " + std::string(py::str(py::type::handle_of(object))));
  return *reinterpret_cast<OpObject*>(object.ptr());
}

// ---- ops ----

py::object define_op(const std::string& name, const std::string& schema, const py::list& args, const py::list& variants,
                     const py::object& fallback, const py::str& doc, const py::object& signature,
                     const std::string& workspace, const std::vector<uint64_t>& workspace_bytes) {
  OpParts parts = read_op(name, args, variants, workspace_bytes);
  const Op& op = Runtime::get().define_op(name, schema, std::move(parts.args), std::move(parts.variants), workspace);
  return py::reinterpret_steal<py::object>(
      reinterpret_cast<PyObject*>(make_op(op_type, op, fallback.ptr(), doc.ptr(), signature.ptr())));
}

py::object define_functional(const py::handle& out, const std::string& schema) {
  return py::reinterpret_borrow<py::object>(
      reinterpret_cast<PyObject*>(make_functional(functional_type, &as_op(out), schema)));
}

// ---- overrides ----

/// The index of an argument; -1 for None.
int find_arg(const Op& op, const std::optional<std::string>& name) {
  if (!name) return -1;
  for (size_t i = 0; i < op.args().size(); ++i)
    if (op.args()[i].name == *name) return static_cast<int>(i);
  fail(Fault::kInternal, op.name(), " has no argument ", *name);
}

/// (op, [(argument, form, flag or None)], [argument], the argument that has the rows of those, or None)
Route to_route(const py::handle& given) {
  const auto [op, rules, padded, rows] =
      given.cast<std::tuple<py::object, py::list, std::vector<std::string>, std::optional<std::string>>>();
  Route route{as_op(op).op, {}};
  for (const std::string& each : padded) route.padded.push_back(static_cast<uint8_t>(find_arg(*route.op, each)));
  if (rows) route.rows = static_cast<uint8_t>(find_arg(*route.op, rows));
  for (const auto& item : rules) {
    const auto [arg, form, flag] = item.cast<std::tuple<std::string, std::string, std::optional<std::string>>>();
    const auto* found = std::find(std::begin(kFormNames), std::end(kFormNames), form);
    HD_CHECK(found != std::end(kFormNames), form);
    route.rules.push_back({static_cast<uint8_t>(find_arg(*route.op, arg)), static_cast<Form>(found - kFormNames),
                           find_arg(*route.op, flag)});
  }
  return route;
}

Override* override_op(const std::string& name, bool cuda, const py::list& routes, size_t given, size_t required) {
  std::vector<Route> made;
  for (const auto& route : routes) made.push_back(to_route(route));
  return Override::make(name, cuda, std::move(made), given, required);
}

// ---- statistics and calls ----

py::dict stats_of(OpCounters& counters) {
  // Copied: making Python objects may run the collector, and other threads' Python, which must not find the lock taken.
  std::map<std::string, uint64_t> counted;
  {
    const std::lock_guard lock(OpCounters::mutex);
    counted = counters.misses;
  }
  py::dict misses;
  for (const auto& [reason, count] : counted) misses[py::str(reason)] = count;
  py::dict out;
  out["hits"] = counters.hits.load();
  out["empty"] = counters.empty.load();
  out["fallbacks"] = counters.fallbacks.load();
  out["misses"] = misses;
  return out;
}

void reset_stats(OpCounters& counters) {
  const std::lock_guard lock(OpCounters::mutex);
  counters.hits = counters.empty = counters.fallbacks = 0;
  counters.misses.clear();
}

void fill(const OpObject& self, const py::tuple& args, Call& call) {
  std::vector<PyObject*> given;
  for (const auto& arg : args) given.push_back(arg.ptr());
  if (!fill_call(*self.op, gather_arguments(*self.op, given.data(), given.size(), nullptr).data(), call))
    fail(Fault::kCaller, self.op->name(),
         ": an argument is not a plain CPU or CUDA tensor; the torch dispatcher takes it");
}

py::dict to_dict(const NullLaunch& launch) {
  py::dict out;
  out["function"] = launch.function;
  out["file"] = launch.file;
  out["grid"] = py::make_tuple(launch.config.grid[0], launch.config.grid[1], launch.config.grid[2]);
  out["block"] = py::make_tuple(launch.config.block[0], launch.config.block[1], launch.config.block[2]);
  out["shared"] = launch.config.shared_bytes;
  out["pdl"] = false;
  out["cooperative"] = false;
  out["cluster"] = py::make_tuple(1, 1, 1);
  for (const LaunchAttribute& attribute : launch.attributes) {
    if (attribute.id == kAttributeProgrammaticStreamSerialization) out["pdl"] = attribute.value.flag != 0;
    if (attribute.id == kAttributeCooperative) out["cooperative"] = attribute.value.flag != 0;
    if (attribute.id == kAttributeClusterDimension)
      out["cluster"] = py::make_tuple(attribute.value.cluster.x, attribute.value.cluster.y, attribute.value.cluster.z);
  }
  py::list params;
  for (const auto& bytes : launch.params)
    params.append(py::bytes(reinterpret_cast<const char*>(bytes.data()), bytes.size()));
  out["params"] = params;
  return out;
}

// ---- the module, section by section ----

/// The types of ops, functional ops and sequences; kept for ever, as ops are.
void define_types(py::module_& m) {
  op_type = make_op_type();
  if (!op_type) throw py::error_already_set();
  m.attr("Op") = py::reinterpret_borrow<py::object>(op_type);
  functional_type = make_functional_type();
  if (!functional_type) throw py::error_already_set();
  m.attr("FunctionalOp") = py::reinterpret_borrow<py::object>(functional_type);
  sequence_type = make_sequence_type();
  if (!sequence_type) throw py::error_already_set();
  m.attr("Sequence") = py::reinterpret_borrow<py::object>(sequence_type);
}

void define_sequences(py::module_& m) {
  py::class_<Arena, std::shared_ptr<Arena>>(m, "Arena")
      .def(py::init(&make_arena), py::arg("memory") = py::none())
      .def_property_readonly("nbytes", &Arena::bytes);
  m.def(
      "make_sequence",
      [](const std::string& name, const py::list& slots, const py::list& temps, const py::list& steps, int64_t max_rows,
         const std::shared_ptr<Arena>& arena) {
        return py::reinterpret_steal<py::object>(
            make_sequence(sequence_type, name, slots, temps, steps, max_rows, arena, &as_op));
      },
      py::arg("name"), py::arg("slots"), py::arg("temps"), py::arg("steps"), py::arg("max_rows"), py::arg("arena"));
}

void define_ops(py::module_& m) {
  m.def("define_op", &define_op, py::arg("name"), py::arg("schema"), py::arg("args"), py::arg("variants"),
        py::arg("fallback"), py::arg("doc"), py::arg("signature"), py::arg("workspace") = "",
        py::arg("workspace_bytes") = std::vector<uint64_t>{});
  m.def("define_functional", &define_functional, py::arg("out"), py::arg("schema"));
  m.def(
      "set_traced_call",
      [](const py::object& function) {
        set_traced_call(op_type, function.ptr());
        set_traced_call(functional_type, function.ptr());
      },
      py::arg("function"));
}

void define_overrides(py::module_& m) {
  py::class_<Override, std::unique_ptr<Override, py::nodelete>>(m, "Override")
      .def("undo", &Override::undo)
      .def("resume", &Override::resume)
      .def(
          "make_door",
          [](const Override& self, const py::object& otherwise) {
            return py::reinterpret_steal<py::object>(self.make_door(otherwise.ptr()));
          },
          py::arg("otherwise"));
  m.def("override_op", &override_op, py::arg("name"), py::arg("cuda"), py::arg("routes"), py::arg("given"),
        py::arg("required"), py::return_value_policy::reference);
  m.def(
      "make_attempt",
      [](const py::object& op) { return py::reinterpret_steal<py::object>(make_attempt(*as_op(op).op)); },
      py::arg("op"));
}

/// Building a table; the GIL is free while code is loaded.
void define_table_builder(py::module_& m) {
  py::class_<DeviceTable, std::shared_ptr<DeviceTable>>(m, "Table");
  py::class_<TableBuilder>(m, "TableBuilder")
      .def(py::init<int, int, bool, bool>(), py::arg("device"), py::arg("device_count"), py::arg("pdl"),
           py::arg("early_reads") = true)
      .def(
          "set_ladder",
          [](TableBuilder& self, const py::object& op, const std::vector<int64_t>& edges,
             const std::vector<int64_t>& second) { self.set_ladder(*as_op(op).op, edges, second); },
          py::arg("op"), py::arg("edges"), py::arg("second") = std::vector<int64_t>{})
      .def(
          "add_module",
          [](TableBuilder& self, const std::string& file, const py::bytes& image, const std::string& digest) {
            const auto view = static_cast<std::string_view>(image);
            const py::gil_scoped_release released;
            self.add_module(file, std::span<const char>(view.data(), view.size()), digest);
          },
          py::arg("file"), py::arg("image"), py::arg("digest") = "")
      .def(
          "extend", [](TableBuilder& self, const std::shared_ptr<DeviceTable>& base) { self.extend(base); },
          py::arg("base"))
      .def(
          "add_library",
          [](TableBuilder& self, const std::string& file, const py::bytes& image) {
            const auto view = static_cast<std::string_view>(image);
            const py::gil_scoped_release released;
            self.add_library(file, std::span<const char>(view.data(), view.size()));
          },
          py::arg("file"), py::arg("image"))
      .def(
          "add_record",
          [](TableBuilder& self, const py::object& op, const py::dict& record) {
            return add_record(self, *as_op(op).op, record, 0);
          },
          py::arg("op"), py::arg("record"))
      .def(
          "add_function",
          [](TableBuilder& self, const py::object& op, const py::dict& record, uintptr_t handle) {
            HD_CHECK_BUNDLE(handle, "the TVM-FFI function is null");
            return add_record(self, *as_op(op).op, record, handle);
          },
          py::arg("op"), py::arg("record"), py::arg("handle"))
      .def(
          "add_row",
          [](TableBuilder& self, const py::object& object, const std::string& variant, int64_t k, int64_t n,
             uint32_t bucket, uint32_t record) {
            const Op& op = *as_op(object).op;
            const int index = op.find_variant(variant);
            HD_CHECK_BUNDLE(index >= 0, op.name(), " has no variant \"", variant, "\"");
            HD_CHECK_BUNDLE((k <= 0 || op.has(kK)) && (n <= 0 || op.has(kN)), "row of K = ", k, ", N = ", n, "; ",
                            op.name(), " has no ", k > 0 && !op.has(kK) ? "K" : "N", ": ", op.schema());
            self.add_row(op, static_cast<uint16_t>(index), k, n, bucket, record);
          },
          py::arg("op"), py::arg("variant"), py::arg("k"), py::arg("n"), py::arg("bucket"), py::arg("record"))
      .def("finish", [](TableBuilder& self) { return std::const_pointer_cast<DeviceTable>(self.finish()); })
      .def("publish", &TableBuilder::publish);
}

void define_tables(py::module_& m) {
  m.def("publish", [](const std::shared_ptr<DeviceTable>& table) { Runtime::get().publish(table); }, py::arg("table"));
  m.def(
      "withdraw", [](int device) { Runtime::get().withdraw(static_cast<DeviceSlot>(device + 1)); }, py::arg("device"));
  m.def(
      "table_generation",
      [](int device) -> uint64_t {
        const TableReader reader;
        const DeviceTable* table = Runtime::get().table(static_cast<DeviceSlot>(device + 1));
        return table ? table->generation : 0;
      },
      py::arg("device"));
}

/// Strict mode, statistics, and calls in words.
void define_counters(py::module_& m) {
  m.def("set_strict", [](bool on) { strict_mode.on = on; }, py::arg("on"));
  m.def("is_strict", [] { return strict_mode.on.load(); });
  m.def("add_strict_blocks", [](int64_t count) { strict_mode.blocks += count; }, py::arg("count"));
  m.def(
      "set_strict_query", [](const py::object& query) { strict_mode.query = query.inc_ref().ptr(); }, py::arg("query"));
  m.def("stats", [](const py::object& op) { return stats_of(as_op(op).op->counters()); }, py::arg("op"));
  m.def("reset_stats", [](const py::object& op) { reset_stats(as_op(op).op->counters()); }, py::arg("op"));
  m.def("sequence_stats", [] {
    py::dict out;
    for (const auto& [name, counters] : sequence_counters()) out[py::str(name)] = stats_of(*counters);
    return out;
  });
  m.def("adopted_stats", [] {
    py::list out;  // names may be there twice
    for (const py::object& each : adopted_objects()) {
      const auto [name, counters] = adopted_counters(each);
      out.append(py::make_tuple(*name, stats_of(*counters)));
    }
    return out;
  });
  m.def("reset_adopted_stats", [] {
    for (const py::object& each : adopted_objects()) reset_stats(*adopted_counters(each).second);
  });
  m.def("reset_sequence_stats", [] {
    for (const auto& [name, counters] : sequence_counters()) reset_stats(*counters);
  });
  m.def("explain", [](const py::object& op, const py::args& args, const py::kwargs& by_name) {
    if (Py_TYPE(op.ptr()) == reinterpret_cast<PyTypeObject*>(sequence_type))
      return explain_sequence(op.ptr(), args, by_name);
    if (!by_name.empty())
      fail(Fault::kCaller, "explain takes keywords of ops and sequences, not of ", std::string(py::repr(op)));
    Call call;
    fill(as_op(op), args, call);
    const TableReader reader;
    return Runtime::get().explain(*as_op(op).op, call);
  });
}

void define_drivers(py::module_& m) {
  m.def("driver_missing", &cuda_driver_missing);
  m.def("null_record", &null_record, py::arg("on"));
  m.def("null_launches", [] {
    py::list out;
    for (const NullLaunch& launch : null_launches()) out.append(to_dict(launch));
    return out;
  });
}

void define_benchmarks(py::module_& m) {
  m.def(
      "bench_launch_ns",
      [](const py::object& op, const py::tuple& args, uint32_t count, bool pdl) {
        Call call;
        const Op& timed = *as_op(op).op;
        fill(as_op(op), args, call);
        const py::gil_scoped_release released;
        return bench_launch_ns(timed, call, count, pdl);
      },
      py::arg("op"), py::arg("args"), py::arg("count"), py::arg("pdl"));
  m.def(
      "bench_dispatch_ns",
      [](const py::object& op, const py::tuple& args, uint32_t count) {
        Call call;
        const Op& timed = *as_op(op).op;
        fill(as_op(op), args, call);
        const py::gil_scoped_release released;
        return bench_dispatch_ns(timed, call, count);
      },
      py::arg("op"), py::arg("args"), py::arg("count"));
  m.def(
      "bench_function_ns",
      [](const py::object& op, const py::tuple& args, uint32_t count) {
        Call call;
        const Op& timed = *as_op(op).op;
        fill(as_op(op), args, call);
        const py::gil_scoped_release released;
        return bench_function_ns(timed, call, count);
      },
      py::arg("op"), py::arg("args"), py::arg("count"));
  m.def("bench_function", &bench_function);
  m.def(
      "bench_empty_ns",
      [](const py::object& like, const std::string& stage, uint32_t count, const py::object& before,
         const py::tuple& args) {
        std::vector<PyObject*> given;
        for (const auto& arg : args) given.push_back(arg.ptr());
        return bench_empty_ns(like.ptr(), stage, count, before.is_none() ? nullptr : before.ptr(), given);
      },
      py::arg("like"), py::arg("stage"), py::arg("count"), py::arg("before") = py::none(),
      py::arg("args") = py::tuple());
  m.def("bench_probe_ns", &bench_probe_ns, py::arg("rows"), py::arg("count"));
}

/// What tests and the build wing compare with their own.
void define_keys(py::module_& m) {
  m.def(
      "key_hash",
      [](uint16_t op, uint16_t variant, uint32_t k, uint32_t n, uint16_t bucket) {
        return hash(make_key(op, variant, k, n, bucket));
      },
      py::arg("op"), py::arg("variant"), py::arg("k"), py::arg("n"), py::arg("bucket"));
  m.def(
      "bucket", [](const std::vector<int64_t>& edges, int64_t m_size) { return Ladder(edges).bucket(m_size); },
      py::arg("edges"), py::arg("m"));
}

}  // namespace
}  // namespace hdispatch

PYBIND11_MODULE(_C, m) {
  using namespace hdispatch;
  m.doc() = "The C++ core and its doors. Private: use the hdispatch package.";
  load_error_classes();
  check_torch_layout();
  py::register_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const Error&) {
      set_python_error();
    }
  });
  define_types(m);
  define_sequences(m);
  define_adopted(m);
  define_ops(m);
  define_overrides(m);
  define_table_builder(m);
  define_tables(m);
  define_counters(m);
  define_drivers(m);
  define_benchmarks(m);
  define_keys(m);
}
