// adopted_key.cpp -- reading the arguments of a call as Triton's specialization does.
#include "adopted_key.h"

#include <algorithm>
#include <bit>

#include "key.h"
#include "tensor_view.h"
#include "torch_python.h"

namespace hdispatch {
namespace {

PyObject* constexpr_class;
PyObject* function_class;

constexpr uint64_t kMultiple = 1 << 4;  ///< a multiple of 16
constexpr size_t kMaxForms = 64;        ///< of one kernel: keywords in ever new orders are Triton's

// Tags of exact words, in the low three bits.
constexpr uint64_t kTagInteger = 1;
constexpr uint64_t kTagNumbered = 2;
constexpr uint64_t kTagSingleton = 3;
constexpr uint64_t kTagFloat = 7;  // 4 to 6 are those of host kernels (adopted_host.cpp)
constexpr int64_t kMaxExactInteger = int64_t{1} << 60;

constexpr uint16_t code_of(ArgumentClass kind, uint64_t facts = 0) noexcept {
  return static_cast<uint16_t>(static_cast<uint64_t>(kind) | facts);
}

bool same_names(PyObject* a, PyObject* b) noexcept {
  if (a == b) return true;
  if (!a || !b || PyTuple_GET_SIZE(a) != PyTuple_GET_SIZE(b)) return false;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(a); ++i)
    if (PyTuple_GET_ITEM(a, i) != PyTuple_GET_ITEM(b, i)) return false;
  return true;
}

/// Names of keywords are interned nearly always; equal ones that are not make a form of their own.
bool is_named(PyObject* a, PyObject* b) noexcept { return a == b || PyUnicode_Compare(a, b) == 0; }

}  // namespace

// ---- constants ----

uint32_t ConstantTable::number(PyObject* value) {
  Recent& recent = recent_[(reinterpret_cast<uintptr_t>(value) >> 4) % recent_.size()];
  if (HD_LIKELY(recent.object == value)) return recent.number;
  if (!numbers_ && !(numbers_ = PyDict_New())) return PyErr_Clear(), 0;
  PyObject* key = PyTuple_Pack(2, reinterpret_cast<PyObject*>(Py_TYPE(value)), value);
  if (!key) return PyErr_Clear(), 0;
  // Hashing and comparing may run Python, and other threads': the number is taken before, and is nobody else's.
  PyObject* known = PyDict_GetItemWithError(numbers_, key);
  uint32_t number = 0;
  if (known) {
    number = static_cast<uint32_t>(PyLong_AsLong(known));
  } else if (!PyErr_Occurred() && next_ <= kMax) {
    PyObject* mine = PyLong_FromUnsignedLong(next_++);
    PyObject* kept = mine ? PyDict_SetDefault(numbers_, key, mine) : nullptr;
    if (kept) number = static_cast<uint32_t>(PyLong_AsLong(kept));
    if (kept && kept == mine) recent = {value, number};  // held by the key
    Py_XDECREF(mine);
  }
  PyErr_Clear();
  Py_DECREF(key);
  return number;
}

int ConstantTable::traverse(visitproc visit, void* arg) const {
  Py_VISIT(numbers_);
  return 0;
}

void ConstantTable::clear() noexcept {
  recent_.fill({});
  Py_CLEAR(numbers_);
}

// ---- forms ----

KeyReader::KeyReader(std::vector<AdoptedParameter> parameters, bool may_lack)
    : parameters_(std::move(parameters)), may_lack_(may_lack) {
  HD_CHECK(parameters_.size() <= kMaxAdoptedArguments, parameters_.size());
  for (const AdoptedParameter& each : parameters_) {
    Py_INCREF(each.name);
    Py_XINCREF(each.fallback);
  }
}

KeyReader::~KeyReader() { clear(); }

void KeyReader::clear() noexcept {
  constants_.clear();
  for (AdoptedParameter& each : parameters_) {
    Py_CLEAR(each.name);
    Py_CLEAR(each.fallback);
  }
  parameters_.clear();
  for (CallForm* form : forms_) {
    Py_XDECREF(form->keyword_names);
    delete form;
  }
  forms_.clear();
  for (std::vector<PyObject*>& names : option_sets_)
    for (PyObject* name : names) Py_DECREF(name);
  option_sets_.clear();
}

int KeyReader::traverse(visitproc visit, void* arg) const {
  for (const AdoptedParameter& each : parameters_) Py_VISIT(each.fallback);
  return constants_.traverse(visit, arg);
}

void KeyReader::set_constant_types(PyObject* constexpr_type, PyObject* function_type) {
  constexpr_class = Py_NewRef(constexpr_type);
  function_class = Py_NewRef(function_type);
}

CallForm KeyReader::make_form(size_t positional, PyObject* keyword_names, bool is_run) {
  CallForm form{Py_XNewRef(keyword_names), positional, is_run};
  form.sources.assign(parameters_.size(), -1);
  form.is_wrong = positional > parameters_.size();
  const size_t given = std::min(positional, parameters_.size());
  for (size_t i = 0; i < given; ++i) form.sources[i] = static_cast<int16_t>(i);
  const Py_ssize_t keywords = keyword_names ? PyTuple_GET_SIZE(keyword_names) : 0;
  for (Py_ssize_t k = 0; k < keywords; ++k) {
    PyObject* name = PyTuple_GET_ITEM(keyword_names, k);
    const int argument = static_cast<int>(positional) + static_cast<int>(k);
    const auto found = std::ranges::find_if(parameters_, [&](const auto& each) { return is_named(each.name, name); });
    if (is_run && PyUnicode_CompareWithASCIIString(name, "grid") == 0) {
      form.grid = argument;
    } else if (PyUnicode_CompareWithASCIIString(name, is_run ? "warmup" : "grid") == 0 ||
               PyUnicode_CompareWithASCIIString(name, "warmup") == 0) {
      is_run ? void(form.warmup = argument) : void(form.is_wrong = true);
    } else if (found != parameters_.end()) {
      int16_t& source = form.sources[static_cast<size_t>(found - parameters_.begin())];
      form.is_wrong = form.is_wrong || source >= 0;
      source = static_cast<int16_t>(argument);
    } else {
      form.options.push_back(static_cast<uint16_t>(argument));
      form.option_names.push_back(name);
    }
  }
  for (size_t i = 0; i < parameters_.size(); ++i)
    form.is_wrong = form.is_wrong || (form.sources[i] < 0 && !parameters_[i].fallback && !may_lack_);
  form.is_wrong = form.is_wrong || form.options.size() > kMaxOptions;
  if (form.is_wrong) return form;
  const auto same = std::ranges::find_if(option_sets_, [&](const auto& names) {
    return std::ranges::equal(names, form.option_names, [](PyObject* a, PyObject* b) { return is_named(a, b); });
  });
  form.option_set = static_cast<uint16_t>(same - option_sets_.begin());
  if (same == option_sets_.end()) {
    for (PyObject* name : form.option_names) Py_INCREF(name);
    option_sets_.push_back(form.option_names);
    form.is_wrong = option_sets_.size() > 1000;
  }
  return form;
}

const CallForm& KeyReader::form(size_t positional, PyObject* keyword_names, bool is_run) {
  for (size_t i = 0; i < forms_.size(); ++i) {
    CallForm* each = forms_[i];
    if (each->positional != positional || each->is_run != is_run || !same_names(each->keyword_names, keyword_names))
      continue;
    if (HD_UNLIKELY(i > 0)) std::swap(forms_[i], forms_[i - 1]);
    return *each;
  }
  static const CallForm too_many{.is_wrong = true}, too_many_of_run{.is_run = true, .is_wrong = true};
  if (forms_.size() == kMaxForms) return is_run ? too_many_of_run : too_many;
  forms_.push_back(new CallForm(make_form(positional, keyword_names, is_run)));
  return *forms_.back();
}

// ---- arguments ----

namespace {

bool has_tensors(PyObject* object) {
  if (!PyTuple_Check(object)) return false;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(object); ++i)
    if (is_tensor_object(PyTuple_GET_ITEM(object, i)) || has_tensors(PyTuple_GET_ITEM(object, i))) return true;
  return false;
}

}  // namespace

/// A value that is compiled in, told from every other.
bool KeyReader::exact_word(PyObject* object, uint64_t& word) {
  if (Py_TYPE(object) == &PyLong_Type) {
    int overflow = 0;
    const long long value = PyLong_AsLongLongAndOverflow(object, &overflow);
    if (HD_LIKELY(!overflow && value < kMaxExactInteger && value >= -kMaxExactInteger)) {
      word = static_cast<uint64_t>(value) << 3 | kTagInteger;
      return true;
    }
  }
  // Equal floats that are not the same: 0.0 and -0.0; and NaN, which equals nothing. All of them end in zeros.
  if (Py_TYPE(object) == &PyFloat_Type) {
    const auto bits = std::bit_cast<uint64_t>(PyFloat_AS_DOUBLE(object));
    if ((bits & 7) == 0) {
      word = bits | kTagFloat;
      return true;
    }
  }
  if (object == Py_None || PyBool_Check(object)) {
    word = (object == Py_None ? 0u : object == Py_True ? 1u : 2u) << 3 | kTagSingleton;
    return true;
  }
  if (HD_UNLIKELY(is_tensor_object(object)) || HD_UNLIKELY(has_tensors(object))) return false;  // held for ever
  const uint32_t number = constants_.number(object);
  word = uint64_t{number} << 3 | kTagNumbered;
  return number != 0;
}

namespace {

bool is_multiple(const AdoptedParameter& parameter, uint64_t value) noexcept {
  return parameter.specialize && parameter.align && (value & 15) == 0;
}

uint16_t code_of_pointer(const AdoptedParameter& parameter, uint64_t address, int8_t scalar_type) noexcept {
  return code_of(ArgumentClass::kTensor,
                 (is_multiple(parameter, address) ? kMultiple : 0) | static_cast<uint64_t>(scalar_type) << 8);
}

uint16_t code_of_integer(const AdoptedParameter& parameter, int64_t value) noexcept {
  if (HD_UNLIKELY(value == 1) && parameter.specialize) return code_of(ArgumentClass::kOne);
  const bool is_small = value >= INT32_MIN && value <= INT32_MAX;
  return code_of(is_small ? ArgumentClass::kInt32 : ArgumentClass::kInt64,
                 is_multiple(parameter, static_cast<uint64_t>(value)) ? kMultiple : 0);
}

uint64_t word_of_integer(int64_t value) noexcept { return static_cast<uint64_t>(value) << 3 | kTagInteger; }

}  // namespace

bool KeyReader::classify(const AdoptedParameter& parameter, PyObject* object, DeviceSlot slot, uint16_t& code,
                         uint64_t& value, const char*& reason) {
  PyTypeObject* type = Py_TYPE(object);
  if (is_exact_tensor_type(type)) {
    const at::Tensor& tensor = tensor_of(object);
    c10::TensorImpl* impl = tensor.unsafeGetTensorImpl();
    if (HD_UNLIKELY(!is_plain(impl->key_set()))) return reason = "tensor that torch has to handle", false;
    if (HD_UNLIKELY(slot_of(impl->device()) != slot)) return reason = "tensor on another device", false;
    value = HD_LIKELY(impl->numel() != 0) ? address_of(impl, true) : 0;  // as data_ptr()
    const uint64_t aligned = parameter.specialize && parameter.align && (value & 15) == 0 ? kMultiple : 0;
    code =
        code_of(ArgumentClass::kTensor, aligned | static_cast<uint64_t>(c10::typeMetaToScalarType(impl->dtype())) << 8);
    return true;
  }
  if (type == &PyLong_Type) {
    int overflow = 0;
    const long long number = PyLong_AsLongLongAndOverflow(object, &overflow);
    value = static_cast<uint64_t>(number);
    if (HD_LIKELY(!overflow)) {
      code = code_of_integer(parameter, number);
      return true;
    }
    value = PyLong_AsUnsignedLongLong(object);
    if (PyErr_Occurred()) return PyErr_Clear(), reason = "integer of more than 64 bits", false;
    code = code_of(ArgumentClass::kUInt64, is_multiple(parameter, value) ? kMultiple : 0);
    return true;
  }
  if (type == &PyFloat_Type) {
    value = std::bit_cast<uint64_t>(PyFloat_AS_DOUBLE(object));
    code = code_of(ArgumentClass::kFloat);
    return true;
  }
  value = object == Py_True;
  if (object == Py_None || type == &PyBool_Type) {
    code = code_of(object == Py_None ? ArgumentClass::kNone : ArgumentClass::kBool);
    return true;
  }
  if (reinterpret_cast<PyObject*>(type) == constexpr_class || reinterpret_cast<PyObject*>(type) == function_class) {
    const uint32_t number = constants_.number(object);
    code = code_of(ArgumentClass::kConstant, uint64_t{number} << 4);
    if (number) return true;
  }
  reason = PyTuple_Check(object) ? "tuple" : is_tensor_object(object) ? "subclass of a tensor" : "argument's type";
  return false;
}

/// Items are told apart by all that any parameter is: `do_not_specialize` may make a row more of them, never a wrong
/// one.
HD_COLD bool KeyReader::read_tuple(PyObject* tuple, DeviceSlot slot, AdoptedCall& call, uint16_t& code,
                                   const char*& reason) {
  static const AdoptedParameter item{};
  const auto size = static_cast<size_t>(PyTuple_GET_SIZE(tuple));
  if (size > kMaxAdoptedArguments - call.value_count) return reason = "tuple", false;
  code = code_of(ArgumentClass::kTuple, size << 4);
  for (size_t i = 0; i < size; ++i) {
    const size_t at = call.value_count++;
    if (!classify(item, PyTuple_GET_ITEM(tuple, static_cast<Py_ssize_t>(i)), slot, call.codes[at], call.values[at],
                  reason))
      return false;
  }
  return true;
}

namespace {

/// Four codes a word.
struct CodeWords {
  uint64_t words[kMaxAdoptedArguments / 4 + 1];
  size_t count = 0;
  uint64_t packed = 0;
  uint32_t shift = 0;

  void add(uint16_t code) noexcept {
    packed |= uint64_t{code} << shift;
    shift += 16;
    if (shift == 64) flush();
  }
  void flush() noexcept {
    words[count++] = packed;
    packed = 0;
    shift = 0;
  }
};

}  // namespace

/// A value that a host record has computed: no Python object is made of it.
bool KeyReader::read_given(size_t index, const GivenValue& given, AdoptedCall& call, size_t& count,
                           const char*& reason) const {
  const AdoptedParameter& parameter = parameters_[index];
  const bool is_pointer = given.kind == GivenValue::Kind::kPointer;
  const auto number = static_cast<int64_t>(given.value);
  if (HD_UNLIKELY(parameter.is_exact || (parameter.is_constexpr && is_pointer)))
    return reason = "compile-time value", false;
  if (parameter.is_constexpr) {
    if (number >= kMaxExactInteger || number < -kMaxExactInteger) return reason = "compile-time value", false;
    call.words[count++] = word_of_integer(number);
    call.codes[index] = code_of(ArgumentClass::kConstant);
    return true;
  }
  call.values[index] = given.value;
  call.codes[index] =
      is_pointer ? code_of_pointer(parameter, given.value, given.scalar_type) : code_of_integer(parameter, number);
  return true;
}

bool KeyReader::read(const CallForm& form, PyObject* const* args, const ComputedArguments* computed, DeviceSlot slot,
                     uint32_t state, AdoptedCall& call, const char*& reason, const GivenValue* given) {
  size_t count = 1;
  CodeWords codes;
  call.words[0] = uint64_t{form.option_set} << 48 | uint64_t{slot} << 32 | state;
  const size_t parameters = parameters_.size();
  call.value_count = parameters;
  for (size_t i = 0; i < parameters; ++i) {
    const AdoptedParameter& parameter = parameters_[i];
    PyObject* object = HD_LIKELY(form.sources[i] >= 0) ? args[form.sources[i]] : parameter.fallback;
    if (HD_UNLIKELY(computed && computed->parameters[i])) object = computed->parameters[i];
    call.objects[i] = object;
    call.values[i] = 0;
    uint16_t& code = call.codes[i] = code_of(ArgumentClass::kAbsent);
    if (HD_UNLIKELY(given) && given[i].kind != GivenValue::Kind::kObject) {
      if (HD_UNLIKELY(!read_given(i, given[i], call, count, reason))) return false;
      if (!parameter.is_constexpr) codes.add(code);
      continue;
    }
    if (parameter.is_constexpr || parameter.is_exact) {
      uint64_t& word = call.words[count++] = 0;
      if (object && HD_UNLIKELY(!exact_word(object, word)))
        return reason = "compile-time value that cannot be hashed, or one of too many", false;
      if (object) code = code_of(ArgumentClass::kConstant);
    }
    if (parameter.is_constexpr) continue;
    if (HD_LIKELY(object != nullptr) && HD_UNLIKELY(!classify(parameter, object, slot, code, call.values[i], reason)) &&
        (!PyTuple_CheckExact(object) || !read_tuple(object, slot, call, code, reason)))
      return false;
    codes.add(code);
  }
  for (size_t i = parameters; HD_UNLIKELY(i < call.value_count); ++i) codes.add(call.codes[i]);
  if (codes.shift) codes.flush();
  for (const uint16_t option : form.options)
    if (HD_UNLIKELY(!exact_word(args[option], call.words[count++])))
      return reason = "option that cannot be hashed, or one of too many", false;
  for (size_t i = 0; computed && i < computed->options.size(); ++i)
    if (HD_UNLIKELY(!exact_word(computed->options[i], call.words[count++])))
      return reason = "option that cannot be hashed, or one of too many", false;
  std::copy(codes.words, codes.words + codes.count, call.words + count);
  count += codes.count;
  uint64_t hash = 0;
  for (size_t i = 0; i < count; ++i) hash = mix_word(hash, call.words[i]);
  call.hash = hash;
  call.count = count;
  return true;
}

}  // namespace hdispatch
