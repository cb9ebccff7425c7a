// module.cpp -- pybind11: defining ops, building tables, strict mode, stats, explain. Nothing hot.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bench.h"
#include "op_call.h"
#include "tensor_view.h"

namespace py = pybind11;

namespace hdispatch {
namespace {

PyObject* op_type;  // owned; made at import

const OpObject& as_op(const py::handle& object) {
  if (Py_TYPE(object.ptr()) != reinterpret_cast<PyTypeObject*>(op_type))
    throw py::type_error("expected an hdispatch op, got " + std::string(py::str(py::type::handle_of(object))));
  return *reinterpret_cast<OpObject*>(object.ptr());
}

template <typename T>
T get(const py::dict& dict, const char* key) {
  if (!dict.contains(key))
    fail(Fault::kBundle, "field \"", key, "\" is missing in ", std::string(py::repr(dict)).substr(0, 200));
  try {
    return dict[key].cast<T>();
  } catch (const py::cast_error&) {
    fail(Fault::kBundle, "field \"", key, "\" is ", std::string(py::repr(dict[key])).substr(0, 200),
         ", of the wrong type");
  }
}

DType to_dtype(const std::string& name) {
  const auto dtype = dtype_named(name);
  HD_CHECK_BUNDLE(dtype, "dtype \"", name, "\" is not one that an op takes");
  return *dtype;
}

// ---- ops ----

Dim to_dim(const py::handle& dim) {
  if (py::isinstance<py::int_>(dim)) return {dim.cast<int64_t>(), kSymbols, false};
  const auto [factor, symbol] = dim.cast<std::pair<int64_t, std::string>>();
  HD_CHECK_BUNDLE(symbol == "M" || symbol == "K" || symbol == "N", "dimension symbol \"", symbol,
                  "\" is not M, K or N");
  return {factor, static_cast<uint8_t>(symbol == "M" ? kM : symbol == "K" ? kK : kN), false};
}

ArgSpec to_arg(const py::dict& given) {
  ArgSpec arg;
  arg.name = get<std::string>(given, "name");
  arg.is_tensor = get<std::string>(given, "kind") == "tensor";
  if (!arg.is_tensor) {
    arg.minimum = get<double>(given, "minimum");
    return arg;
  }
  for (const auto& dim : get<py::list>(given, "dims")) arg.dims.push_back(to_dim(dim));
  for (const auto& dtype : get<std::vector<std::string>>(given, "dtypes")) arg.dtypes.push_back(to_dtype(dtype));
  arg.is_mutated = get<bool>(given, "mutated");
  arg.is_optional = get<bool>(given, "optional");
  arg.is_row_strided = get<bool>(given, "row_strided");
  return arg;
}

py::object define_op(const std::string& name, const std::string& schema, const py::list& args, const py::list& variants,
                     const py::object& fallback) {
  std::vector<ArgSpec> specs;
  for (const auto& arg : args) specs.push_back(to_arg(arg.cast<py::dict>()));
  std::vector<Variant> made;
  for (const auto& item : variants) {
    const auto [variant_name, dtypes] = item.cast<std::pair<std::string, std::map<std::string, std::string>>>();
    Variant variant{variant_name, 0};
    for (size_t i = 0; i < specs.size(); ++i)
      if (const auto dtype = dtypes.find(specs[i].name); dtype != dtypes.end())
        variant.signature |= static_cast<uint64_t>(to_dtype(dtype->second)) << (4 * i);
    made.push_back(std::move(variant));
  }
  const Op& op = Runtime::get().define_op(name, schema, std::move(specs), std::move(made));
  return py::reinterpret_steal<py::object>(reinterpret_cast<PyObject*>(make_op(op_type, op, fallback.ptr())));
}

// ---- records ----

Expr to_expr(const py::handle& given, const Op& op) {
  std::vector<Token> tokens;
  for (const auto& token : given.cast<py::list>()) {
    if (py::isinstance<py::int_>(token))
      tokens.emplace_back(token.cast<int64_t>());
    else
      tokens.emplace_back(token.cast<std::string>());
  }
  return Expr(tokens, [&op](std::string_view name) { return op.find_tensor(name); });
}

Param to_param(const py::dict& given, const Op& op) {
  Param param;
  const auto kind = get<std::string>(given, "kind");
  size_t index = 0;
  while (index < kParamKindNames.size() && kParamKindNames[index] != kind) ++index;
  HD_CHECK_BUNDLE(index < kParamKindNames.size(), "param kind \"", kind, "\" is not known");
  param.kind = static_cast<ParamKind>(index);
  if (param.kind == ParamKind::kPtr) {
    const auto name = get<std::string>(given, "arg");
    param.arg = op.find_tensor(name);
    param.name = name;
    HD_CHECK_BUNDLE(param.arg >= 0, op.name(), " has no tensor argument \"", name, "\"");
    if (given.contains("align")) param.align = get<uint32_t>(given, "align");
    if (given.contains("offset")) param.value = to_expr(given["offset"], op);
  } else if (param.kind == ParamKind::kF32 || param.kind == ParamKind::kF64) {
    if (given.contains("const")) {
      param.constant = get<double>(given, "const");
    } else {
      const auto name = get<std::string>(given, "arg");
      param.arg = op.find_scalar(name);
      HD_CHECK_BUNDLE(param.arg >= 0, op.name(), " has no float argument \"", name, "\"");
    }
  } else {
    param.value = to_expr(get<py::list>(given, "value"), op);
  }
  return param;
}

Cubin to_cubin(const py::dict& given) {
  Cubin cubin;
  cubin.file = get<std::string>(given, "file");
  cubin.function = get<std::string>(given, "function");
  cubin.params = get<std::vector<uint32_t>>(given, "params");
  cubin.num_warps = get<uint32_t>(given, "num_warps");
  cubin.shared_bytes = get<uint32_t>(given, "shared_bytes");
  cubin.cluster = get<std::array<uint32_t, 3>>(given, "cluster");
  cubin.cooperative = get<bool>(given, "cooperative");
  cubin.pdl = get<bool>(given, "pdl");
  return cubin;
}

Record to_record(const py::dict& given, const Op& op) {
  Record record;
  record.kernel = get<std::string>(given, "kernel");
  record.m_min = get<int64_t>(given, "m_min");
  record.m_max = get<int64_t>(given, "m_max");
  const auto grid = get<py::list>(given, "grid");
  HD_CHECK_BUNDLE(grid.size() == 3, record.kernel, ": grid has ", grid.size(), " dimensions; it takes 3");
  for (size_t i = 0; i < 3; ++i) record.grid[i] = to_expr(grid[i], op);
  for (const auto& param : get<py::list>(given, "params"))
    record.params.push_back(to_param(param.cast<py::dict>(), op));
  for (const auto& item : get<py::list>(given, "guards")) {
    const auto guard = item.cast<py::dict>();
    record.guards.push_back({to_expr(get<py::list>(guard, "expr"), op), get<std::string>(guard, "text")});
  }
  for (const auto& [key, cubin] : get<py::dict>(given, "cubins")) {
    const auto name = key.cast<std::string>();
    size_t index = 0;
    while (index < kMClasses && kMClassNames[index] != name) ++index;
    HD_CHECK_BUNDLE(index < kMClasses, record.kernel, ": \"", name, "\" is not a class of M");
    record.cubins[index] = to_cubin(cubin.cast<py::dict>());
  }
  return record;
}

// ---- statistics and calls ----

py::dict stats_of(const Op& op) {
  OpCounters& counters = op.counters();
  py::dict misses;
  {
    const std::lock_guard lock(counters.mutex);
    for (const auto& [reason, count] : counters.misses) misses[py::str(reason)] = count;
  }
  py::dict out;
  out["hits"] = counters.hits.load();
  out["empty"] = counters.empty.load();
  out["fallbacks"] = counters.fallbacks.load();
  out["misses"] = misses;
  return out;
}

void reset_stats(const Op& op) {
  OpCounters& counters = op.counters();
  const std::lock_guard lock(counters.mutex);
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

}  // namespace
}  // namespace hdispatch

PYBIND11_MODULE(_C, m) {
  using namespace hdispatch;
  m.doc() = "The C++ core and its doors. Private: use the hdispatch package.";
  load_error_classes();
  py::register_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const Error&) {
      set_python_error();
    }
  });
  op_type = make_op_type();
  if (!op_type) throw py::error_already_set();
  m.attr("Op") = py::reinterpret_borrow<py::object>(op_type);

  m.def("define_op", &define_op, py::arg("name"), py::arg("schema"), py::arg("args"), py::arg("variants"),
        py::arg("fallback"));
  py::class_<TableBuilder>(m, "TableBuilder")
      .def(py::init<int, int, bool>(), py::arg("device"), py::arg("device_count"), py::arg("pdl"))
      .def(
          "set_ladder",
          [](TableBuilder& self, const py::object& op, const std::vector<int64_t>& edges) {
            self.set_ladder(*as_op(op).op, edges);
          },
          py::arg("op"), py::arg("edges"))
      .def(
          "add_module",
          [](TableBuilder& self, const std::string& file, const py::bytes& image) {
            const auto view = static_cast<std::string_view>(image);
            self.add_module(file, std::span<const char>(view.data(), view.size()));
          },
          py::arg("file"), py::arg("image"))
      .def(
          "add_record",
          [](TableBuilder& self, const py::object& op, const py::dict& record) {
            try {
              return self.add_record(to_record(record, *as_op(op).op));
            } catch (const py::cast_error&) {  // `get` names the field; this is something inside a list
              fail(Fault::kBundle, "record ", std::string(py::repr(record)).substr(0, 200),
                   " holds a value of the wrong type");
            }
          },
          py::arg("op"), py::arg("record"))
      .def(
          "add_row",
          [](TableBuilder& self, const py::object& object, const std::string& variant, int64_t k, int64_t n,
             uint32_t bucket, uint32_t record) {
            const Op& op = *as_op(object).op;
            const int index = op.find_variant(variant);
            HD_CHECK_BUNDLE(index >= 0, op.name(), " has no variant \"", variant, "\"");
            self.add_row(op, static_cast<uint16_t>(index), k, n, bucket, record);
          },
          py::arg("op"), py::arg("variant"), py::arg("k"), py::arg("n"), py::arg("bucket"), py::arg("record"))
      .def("publish", &TableBuilder::publish);
  m.def(
      "withdraw", [](int device) { Runtime::get().withdraw(static_cast<DeviceSlot>(device + 1)); }, py::arg("device"));

  m.def("set_strict", [](bool on) { return strict_mode.exchange(on); }, py::arg("on"));
  m.def("stats", [](const py::object& op) { return stats_of(*as_op(op).op); }, py::arg("op"));
  m.def("reset_stats", [](const py::object& op) { reset_stats(*as_op(op).op); }, py::arg("op"));
  m.def("explain", [](const py::object& op, const py::args& args) {
    Call call;
    fill(as_op(op), args, call);
    return Runtime::get().explain(*as_op(op).op, call);
  });

  m.def("driver_missing", &cuda_driver_missing);
  m.def("null_record", &null_record, py::arg("on"));
  m.def("null_launches", [] {
    py::list out;
    for (const NullLaunch& launch : null_launches()) out.append(to_dict(launch));
    return out;
  });

  m.def(
      "bench_launch_ns",
      [](const py::object& op, const py::tuple& args, uint32_t count, bool pdl) {
        Call call;
        fill(as_op(op), args, call);
        return bench_launch_ns(*as_op(op).op, call, count, pdl);
      },
      py::arg("op"), py::arg("args"), py::arg("count"), py::arg("pdl"));
  m.def("bench_probe_ns", &bench_probe_ns, py::arg("rows"), py::arg("count"));
  m.def(
      "key_hash",
      [](uint16_t op, uint16_t variant, uint32_t k, uint32_t n, uint16_t bucket) {
        return hash(make_key(op, variant, k, n, bucket, kDeviceClass));
      },
      py::arg("op"), py::arg("variant"), py::arg("k"), py::arg("n"), py::arg("bucket"));
  m.def(
      "bucket", [](const std::vector<int64_t>& edges, int64_t m_size) { return Ladder(edges).bucket(m_size); },
      py::arg("edges"), py::arg("m"));
}
