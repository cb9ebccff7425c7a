// from_python.cpp -- the fields of dicts, checked and converted one by one.
#include "from_python.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <optional>
#include <tuple>
#include <utility>

namespace py = pybind11;

namespace hdispatch {
namespace {

/// A value in a message: the beginning of its repr, cut between characters.
std::string shown(const py::handle& value) {
  std::string words = py::repr(value);
  size_t end = std::min(words.size(), size_t{200});
  while (end < words.size() && end > 0 && (words[end] & 0xc0) == 0x80) --end;  // within a character of UTF-8
  words.resize(end);
  return words;
}

template <typename T>
T get(const py::dict& dict, const char* key) {
  if (!dict.contains(key)) fail(Fault::kBundle, "field \"", key, "\" is missing in ", shown(dict));
  try {
    T value = dict[key].cast<T>();
    if constexpr (std::is_same_v<T, std::string>)  // the driver and the loader would read it up to there
      HD_CHECK_BUNDLE(value.find('\0') == std::string::npos, "field \"", key, "\" is ", shown(dict[key]),
                      "; it takes no NUL");
    return value;
  } catch (const py::cast_error&) {
    fail(Fault::kBundle, "field \"", key, "\" is ", shown(dict[key]), ", of the wrong type");
  }
}

DType to_dtype(const std::string& name) {
  const auto dtype = dtype_named(name);
  HD_CHECK_BUNDLE(dtype, "dtype \"", name, "\" is not one that an op takes");
  return *dtype;
}
// ---- ops ----

bool names_size(std::string_view word) { return symbol_named(word) >= 0; }

uint8_t to_symbol(const std::string& symbol) {
  HD_CHECK_BUNDLE(names_size(symbol), "dimension symbol \"", symbol, "\" is not M, K, N, A or B");
  return static_cast<uint8_t>(symbol_named(symbol));
}

/// (factor, symbol or None or "*", divisor: a number or an argument's name), as `opspec.parse_dim` gives it.
Dim to_dim(const py::handle& given, const std::vector<std::string>& names) {
  const auto [factor, symbol, divisor] = given.cast<std::tuple<int64_t, py::object, py::object>>();
  Dim dim;
  dim.factor = factor;
  if (symbol.is_none()) return dim;
  if (symbol.cast<std::string>() == "*") {
    dim.any = true;
    return dim;
  }
  dim.symbol = to_symbol(symbol.cast<std::string>());
  if (py::isinstance<py::int_>(divisor)) {
    dim.divisor = divisor.cast<int64_t>();
    return dim;
  }
  const auto found = std::find(names.begin(), names.end(), divisor.cast<std::string>());
  HD_CHECK_BUNDLE(found != names.end(), "a dimension is divided by ", divisor.cast<std::string>(),
                  ", which is no argument");
  dim.divisor_arg = static_cast<int>(found - names.begin());
  return dim;
}

Layout to_layout(const std::string& name) {
  constexpr std::string_view kNames[] = {"contiguous", "rows", "columns", "any"};
  const auto* found = std::find(std::begin(kNames), std::end(kNames), name);
  HD_CHECK_BUNDLE(found != std::end(kNames), "layout \"", name, "\" is not known");
  return static_cast<Layout>(found - std::begin(kNames));
}

ArgKind to_kind(const std::string& name) {
  constexpr std::string_view kNames[] = {"tensor", "float", "int", "bool", "none", "str"};
  const auto* found = std::find(std::begin(kNames), std::end(kNames), name);
  HD_CHECK_BUNDLE(found != std::end(kNames), "argument kind \"", name, "\" is not known");
  return static_cast<ArgKind>(found - std::begin(kNames));
}

ArgSpec to_arg(const py::dict& given, const std::vector<std::string>& names) {
  ArgSpec arg;
  arg.name = get<std::string>(given, "name");
  arg.kind = to_kind(get<std::string>(given, "kind"));
  if (arg.kind == ArgKind::kNone) arg.is_ignored = get<bool>(given, "ignored");
  if (arg.kind == ArgKind::kFloat) arg.minimum = get<double>(given, "minimum");
  if (arg.kind == ArgKind::kInteger || arg.kind == ArgKind::kBool) {
    arg.values = get<std::vector<int64_t>>(given, "values");
    arg.least = get<int64_t>(given, "minimum");
    arg.has_default = !given["default"].is_none();
    if (arg.has_default) arg.default_value = get<int64_t>(given, "default");
    arg.has_ladder = given.contains("ladder") && get<bool>(given, "ladder");
  }
  if (arg.kind == ArgKind::kString) {
    arg.texts = get<std::vector<std::string>>(given, "values");
    for (size_t i = 0; i < arg.texts.size(); ++i) arg.values.push_back(static_cast<int64_t>(i));
    const auto default_text = get<std::optional<std::string>>(given, "default");
    arg.has_default = default_text.has_value();
    if (arg.has_default) arg.default_value = arg.position({default_text->data(), default_text->size()});
    HD_CHECK_BUNDLE(!arg.has_default || arg.default_value >= 0, arg.name, ": the default ", shown(given["default"]),
                    " is not among the values");
  }
  if (!arg.is_tensor()) return arg;
  for (const auto& dim : get<py::list>(given, "dims")) arg.dims.push_back(to_dim(dim, names));
  for (const auto& dtype : get<std::vector<std::string>>(given, "dtypes")) arg.dtypes.push_back(to_dtype(dtype));
  arg.is_mutated = get<bool>(given, "mutated");
  arg.is_optional = get<bool>(given, "optional");
  arg.is_returned = get<bool>(given, "returned");
  arg.is_zeroed = get<bool>(given, "zeroed");
  if (const auto other = get<std::string>(given, "dtype_of"); !other.empty())
    arg.dtype_of = static_cast<int>(std::find(names.begin(), names.end(), other) - names.begin());
  arg.layout = to_layout(get<std::string>(given, "layout"));
  arg.is_flat = get<bool>(given, "flat");
  arg.is_broadcast = get<bool>(given, "broadcast");
  arg.is_padded = get<bool>(given, "pad");
  arg.is_merged = get<bool>(given, "merge");
  if (const auto other = get<std::string>(given, "in_place"); !other.empty()) {
    const auto found = std::find(names.begin(), names.end(), other);
    HD_CHECK_BUNDLE(found != names.end(), arg.name, " is in place of ", other, ", which is no argument");
    arg.in_place_of = static_cast<int>(found - names.begin());
  }
  return arg;
}

/// Nibble of argument `i` in a variant's signature: a dtype's name, or one of the argument's values.
uint64_t to_nibble(const ArgSpec& arg, const py::handle& given) {
  if (arg.is_tensor()) return static_cast<uint64_t>(to_dtype(given.cast<std::string>()));
  if (arg.kind == ArgKind::kString) {
    const auto text = given.cast<std::string>();
    const int64_t position = arg.position({text.data(), text.size()});
    HD_CHECK_BUNDLE(position >= 0, arg.name, " has no value ", shown(given));
    return static_cast<uint64_t>(position) + 1;
  }
  const auto found = std::find(arg.values.begin(), arg.values.end(), given.cast<int64_t>());
  HD_CHECK_BUNDLE(found != arg.values.end(), arg.name, " has no value ", given.cast<int64_t>());
  return static_cast<uint64_t>(found - arg.values.begin()) + 1;
}

// ---- records ----

Expr to_expr(const py::handle& given, const Op& op) {
  std::vector<Token> tokens;
  for (const auto& token : given.cast<py::list>()) {
    if (py::isinstance<py::int_>(token)) {
      tokens.emplace_back(token.cast<int64_t>());
      continue;
    }
    auto word = token.cast<std::string>();
    HD_CHECK_BUNDLE(!names_size(word) || op.has(static_cast<Symbol>(to_symbol(word))), "expression names \"", word,
                    "\", which ", op.name(), " does not have: ", op.schema());
    tokens.emplace_back(std::move(word));
  }
  return Expr(
      tokens, [&op](std::string_view name) { return op.find_tensor(name); },
      [&op](std::string_view name) { return op.find_integer(name); });
}

std::vector<Expr> to_exprs(const py::list& given, const Op& op) {
  std::vector<Expr> made;
  for (const auto& tokens : given) made.push_back(to_expr(tokens, op));
  return made;
}

TensorMapSpec to_tensor_map(const py::dict& given, const Op& op) {
  const auto type = get<std::string>(given, "type");
  const auto named = std::ranges::find(kTensorMapTypeNames, type);
  HD_CHECK_BUNDLE(named != kTensorMapTypeNames.end(), "TMA descriptor of \"", type,
                  "\", which is no type of its elements");
  const auto fill = get<std::string>(given, "fill");
  HD_CHECK_BUNDLE(fill == "zero" || fill == "nan", "TMA descriptor filled with \"", fill, "\"; it takes zero or nan");
  return {static_cast<TensorMapType>(named - kTensorMapTypeNames.begin()),
          to_exprs(get<py::list>(given, "shape"), op),
          to_exprs(get<py::list>(given, "strides"), op),
          get<std::vector<uint32_t>>(given, "box"),
          get<uint32_t>(given, "swizzle"),
          fill == "nan"};
}

Param to_param(const py::dict& given, const Op& op) {
  Param param;
  const auto kind = get<std::string>(given, "kind");
  size_t index = 0;
  while (index < kParamKindNames.size() && kParamKindNames[index] != kind) ++index;
  HD_CHECK_BUNDLE(index < kParamKindNames.size(), "param kind \"", kind, "\" is not known");
  param.kind = static_cast<ParamKind>(index);
  if (param.kind == ParamKind::kPtr || param.kind == ParamKind::kTensorMap) {
    const auto name = get<std::string>(given, "arg");
    param.arg = op.find_memory(name);
    param.name = name;
    HD_CHECK_BUNDLE(param.arg >= 0, op.name(), " has no tensor argument \"", name, "\"");
    if (given.contains("align")) param.align = get<uint32_t>(given, "align");
    if (given.contains("offset")) param.value = to_expr(given["offset"], op);
    if (param.kind == ParamKind::kPtr) return param;
    param.align = 16;
    param.map = to_tensor_map(get<py::dict>(given, "map"), op);
  } else if (param.kind == ParamKind::kF32 || param.kind == ParamKind::kF64) {
    if (given.contains("const")) {
      param.constant = get<double>(given, "const");
    } else {
      const auto name = get<std::string>(given, "arg");
      param.arg = op.find_float(name);
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

/// The values of the integer argument with a ladder for which a record is valid, as a guard.
Guard second_guard(const py::dict& given, const Op& op) {
  const std::string& name = op.args()[static_cast<size_t>(op.second())].name;
  const auto least = get<int64_t>(given, "second_min");
  const auto most = get<int64_t>(given, "second_max");
  HD_CHECK_BUNDLE(least <= most, get<std::string>(given, "kernel"), ": valid for ", name, " in [", least, ", ", most,
                  "], which is empty");
  const std::vector<Token> tokens = {name, least, ">=", name, most, "<=", "and"};
  Expr expr(tokens, nullptr, [&op](std::string_view word) { return op.find_integer(word); });
  return {std::move(expr), text(least, " <= ", name, " <= ", most)};
}

void read_head(const py::dict& given, const Op& op, RecordHead& record) {
  record.kernel = get<std::string>(given, "kernel");
  record.m_min = get<int64_t>(given, "m_min");
  record.m_max = get<int64_t>(given, "m_max");
  const auto guards = get<py::list>(given, "guards");
  HD_CHECK_BUNDLE(guards.size() <= kMaxGuards, record.kernel, ": ", guards.size(), " guards; a record takes at most ",
                  kMaxGuards);
  if (op.second() >= 0) record.guards.push_back(second_guard(given, op));
  for (const auto& item : guards) {
    const auto guard = item.cast<py::dict>();
    record.guards.push_back({to_expr(get<py::list>(guard, "expr"), op), get<std::string>(guard, "text")});
  }
  for (const uint8_t arg : op.mutated()) {
    const ArgSpec& spec = op.args()[arg];
    const bool by_rows = (spec.layout == Layout::kContiguous || spec.layout == Layout::kRows) && !spec.is_broadcast;
    record.outputs.push_back({arg, by_rows && !spec.dims.empty()});
  }
  // Read and written by whatever code takes it. Without rows: its one dimension is its extent.
  if (op.workspace() >= 0) record.outputs.push_back({static_cast<uint8_t>(op.workspace()), true});
  if (given.contains("early")) {
    for (const auto& name : get<std::vector<std::string>>(given, "early")) {
      const int arg = op.find_tensor(name);
      HD_CHECK_BUNDLE(arg >= 0, record.kernel, ": reads \"", name, "\" early; ", op.name(),
                      " has no tensor argument of that name: ", op.schema());
      record.early.push_back(static_cast<uint8_t>(arg));
    }
  }
}

FfiArg to_ffi_arg(const py::dict& given, const Op& op) {
  FfiArg arg;
  const auto kind = get<std::string>(given, "kind");
  const auto* named = std::ranges::find(kFfiArgKindNames, kind);
  HD_CHECK_BUNDLE(named != kFfiArgKindNames.end(), "argument kind \"", kind, "\" is not known");
  arg.kind = static_cast<FfiArgKind>(named - kFfiArgKindNames.begin());
  if (arg.kind == FfiArgKind::kTensor) {
    arg.name = get<std::string>(given, "arg");
    arg.arg = op.find_memory(arg.name);
    HD_CHECK_BUNDLE(arg.arg >= 0, op.name(), " has no tensor argument \"", arg.name, "\"");
    if (given.contains("align")) arg.align = get<uint32_t>(given, "align");
    if (given.contains("dims")) arg.dims = get<std::vector<uint8_t>>(given, "dims");
    if (given.contains("dtype")) arg.dtype = to_dtype(get<std::string>(given, "dtype"));
  } else if (arg.kind == FfiArgKind::kFloat && given.contains("const")) {
    arg.constant = get<double>(given, "const");
  } else if (arg.kind == FfiArgKind::kFloat) {
    arg.name = get<std::string>(given, "arg");
    arg.arg = op.find_float(arg.name);
    HD_CHECK_BUNDLE(arg.arg >= 0, op.name(), " has no float argument \"", arg.name, "\"");
  } else if (arg.kind == FfiArgKind::kInt || arg.kind == FfiArgKind::kBool) {
    arg.value = to_expr(get<py::list>(given, "value"), op);
  } else if (arg.kind == FfiArgKind::kString) {
    arg.text = get<std::string>(given, "text");
  }
  return arg;
}

/// `file` and `function` are those of a bundle's library; a function of this process has a name only.
FfiRecord to_ffi_record(const py::dict& given, const Op& op) {
  FfiRecord record;
  read_head(given, op, record);
  if (given.contains("file")) record.file = get<std::string>(given, "file");
  record.function = get<std::string>(given, "function");
  for (const auto& arg : get<py::list>(given, "args")) record.args.push_back(to_ffi_arg(arg.cast<py::dict>(), op));
  record.pdl = get<bool>(given, "pdl");
  record.env_stream = get<bool>(given, "env_stream");
  return record;
}

Record to_record(const py::dict& given, const Op& op) {
  Record record;
  read_head(given, op, record);
  const auto grid = get<py::list>(given, "grid");
  HD_CHECK_BUNDLE(grid.size() == 3, record.kernel, ": grid has ", grid.size(), " dimensions; it takes 3");
  for (size_t i = 0; i < 3; ++i) record.grid[i] = to_expr(grid[i], op);
  for (const auto& param : get<py::list>(given, "params"))
    record.params.push_back(to_param(param.cast<py::dict>(), op));
  for (const auto& [key, cubin] : get<py::dict>(given, "cubins")) {
    const auto name = key.cast<std::string>();
    size_t index = 0;
    while (index < kMClasses && kMClassNames[index] != name) ++index;
    HD_CHECK_BUNDLE(index < kMClasses, record.kernel, ": \"", name, "\" is not a class of M");
    record.cubins[index] = to_cubin(cubin.cast<py::dict>());
  }
  return record;
}

}  // namespace

OpParts read_op(const std::string& name, const py::list& args, const py::list& variants,
                const std::vector<uint64_t>& workspace_bytes) {
  std::vector<std::string> names;
  for (const auto& arg : args) names.push_back(get<std::string>(arg.cast<py::dict>(), "name"));
  HD_CHECK_BUNDLE(names.size() <= kMaxArgs, name, ": ", names.size(), " arguments; an op takes at most ", kMaxArgs);
  OpParts parts;
  for (const auto& arg : args) parts.args.push_back(to_arg(arg.cast<py::dict>(), names));
  for (const auto& item : variants) {
    const auto [variant_name, given] = item.cast<std::pair<std::string, py::dict>>();
    Variant variant{variant_name, {}, workspace_bytes.empty() ? 0 : workspace_bytes.at(parts.variants.size())};
    for (size_t i = 0; i < names.size(); ++i)
      if (given.contains(names[i].c_str()))
        variant.signature.set(static_cast<uint32_t>(i), to_nibble(parts.args[i], given[names[i].c_str()]));
    parts.variants.push_back(std::move(variant));
  }
  return parts;
}

uint32_t add_record(TableBuilder& builder, const Op& op, const py::dict& record, uintptr_t function) {
  try {
    if (function) return builder.add_record(to_ffi_record(record, op), live_function(function));
    const auto launcher = get<std::string>(record, "launcher");
    if (launcher == "cubin") return builder.add_record(to_record(record, op));
    HD_CHECK_BUNDLE(launcher == "tvm_ffi", "launcher \"", launcher, "\" is not known");
    return builder.add_record(to_ffi_record(record, op));
  } catch (const py::cast_error&) {  // `get` names the field; this is something inside a list
    fail(Fault::kBundle, "record ", shown(record), " holds a value of the wrong type");
  }
}

}  // namespace hdispatch
