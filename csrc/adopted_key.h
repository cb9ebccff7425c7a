// adopted_key.h -- what Triton would specialize a call on, as words: the key under which a row is found.
//
// Triton compiles other code for: another dtype of a tensor, an address that is a multiple of 16 or not; an integer
// that is 1, that is a multiple of 16, that needs more than 32 bits; a float, a bool, None; another value of a
// constexpr or an option. A key here tells all of these apart, and some that Triton does not (the order of options,
// True and 1 as constexprs): each costs a row more, never a wrong one. Where a value is of a kind whose specialization
// is not written here (tuples in tuples, descriptors, subclasses of tensors), the call has no key and is Triton's.
//
// The order of words: options, state, device; one word of each exact parameter (constexprs, and what an autotuner's key
// names); one of each option; 16 bits of each other parameter, then of each item of those that are tuples.
#pragma once

#include <Python.h>

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "call.h"
#include "check.h"

namespace hdispatch {

inline constexpr size_t kMaxAdoptedArguments = 250;
inline constexpr size_t kMaxOptions = 32;
inline constexpr size_t kMaxKeyWords = 1 + kMaxAdoptedArguments + 2 * kMaxOptions + kMaxAdoptedArguments / 4 + 1;

/// The hash of some words, one word further.
constexpr uint64_t mix_word(uint64_t hash, uint64_t word) noexcept {
  hash = (hash ^ word) * 0x9e3779b97f4a7c15;
  return hash ^ (hash >> 29);
}

/// A parameter of a Triton function. References are owned by whoever made it.
struct AdoptedParameter {
  PyObject* name = nullptr;      ///< interned
  PyObject* fallback = nullptr;  ///< its default; null if it has none
  bool is_constexpr = false;
  bool specialize = true;  ///< on its value: false for do_not_specialize, and types that are not
  bool align = true;       ///< on divisibility by 16
  bool is_exact = false;   ///< an autotuner chooses by its value
};

/// What kind of value an argument is; beside it come the facts that Triton specializes on.
enum class ArgumentClass : uint8_t {
  kAbsent,  ///< not given: a configuration of an autotuner's gives it
  kNone,
  kTensor,
  kInt32,
  kInt64,
  kUInt64,
  kOne,  ///< the integer 1, where it is specialized on
  kFloat,
  kBool,
  kConstant,  ///< a value that the code has compiled in, where a value of run time might have been
  kTuple,     ///< its items are values of their own; beside it comes how many
};

constexpr ArgumentClass class_of_code(uint16_t code) noexcept { return static_cast<ArgumentClass>(code & 15); }

/// How one form of a call (so many positional arguments, these keywords) maps to parameters.
struct CallForm {
  PyObject* keyword_names = nullptr;  ///< owned tuple, or null
  size_t positional = 0;
  bool is_run = false;                  ///< of `run`: `grid` and `warmup` are keywords of its own
  bool is_wrong = false;                ///< Triton says what is
  std::vector<int16_t> sources;         ///< by parameter: index of the argument; -1: the default
  std::vector<uint16_t> options;        ///< the arguments that are none of the parameters'
  std::vector<PyObject*> option_names;  ///< borrowed from keyword_names
  uint16_t option_set = 0;              ///< which options, in their order
  int grid = -1;                        ///< of `run`: argument indices
  int warmup = -1;
};

/// What heuristics give for a call: parameters by index (null: not given) and options in their order. Owned elsewhere.
struct ComputedArguments {
  std::vector<PyObject*> parameters;
  std::vector<PyObject*> options;
};

/// An argument that is no Python object: what a host record computes. Deliberately not initialised.
struct GivenValue {
  enum class Kind : uint8_t { kObject, kPointer, kInteger } kind;
  int8_t scalar_type;  ///< of what a pointer points to, as torch numbers them
  uint64_t value;      ///< an address, or an integer of 64 bits
};

/// A call's key and values, on the caller's stack. Deliberately not initialised: every entry that is read is written.
struct AdoptedCall {
  uint64_t words[kMaxKeyWords];
  size_t count;
  uint64_t hash;
  size_t value_count;                       ///< parameters, and items of tuples behind them, in order
  uint64_t values[kMaxAdoptedArguments];    ///< addresses, integers, bits of doubles
  uint16_t codes[kMaxAdoptedArguments];     ///< of each value; of exact parameters too
  PyObject* objects[kMaxAdoptedArguments];  ///< by parameter; borrowed; null: absent
};

/// The compile-time values that calls brought, each with a number. Bounded: a kernel that is called with ever new ones
/// compiles each time anyway.
class ConstantTable {
 public:
  static constexpr uint32_t kMax = 4095;

  ConstantTable() = default;
  ~ConstantTable() { clear(); }
  ConstantTable(const ConstantTable&) = delete;
  ConstantTable& operator=(const ConstantTable&) = delete;

  /// The number of a value, from 1; 0 for one that cannot be hashed, or one too many. Equal values of one type have
  /// one number, as Triton's own cache has one key for them.
  uint32_t number(PyObject* value);
  int traverse(visitproc visit, void* arg) const;
  void clear() noexcept;

 private:
  struct Recent {
    PyObject* object = nullptr;  ///< borrowed from `numbers_`
    uint32_t number = 0;
  };

  PyObject* numbers_ = nullptr;  ///< dict of (type, value) -> int
  uint32_t next_ = 1;
  std::array<Recent, 64> recent_{};
};

/// Reads arguments of one kernel.
class KeyReader {
 public:
  /// `may_lack`: something else gives arguments that a call lacks.
  KeyReader(std::vector<AdoptedParameter> parameters, bool may_lack);
  ~KeyReader();
  KeyReader(const KeyReader&) = delete;
  KeyReader& operator=(const KeyReader&) = delete;

  /// The form of a call. Valid until the reader is destroyed.
  const CallForm& form(size_t positional, PyObject* keyword_names, bool is_run);

  /// Fills key and values. False with the reason, if the call has no key. `state`: what else the code depends on.
  bool read(const CallForm& form, PyObject* const* args, const ComputedArguments* computed, DeviceSlot slot,
            uint32_t state, AdoptedCall& call, const char*& reason, const GivenValue* given = nullptr);
  /// A value that is compiled in, told from every other; false if it cannot be.
  bool exact_word(PyObject* object, uint64_t& word);

  const std::vector<AdoptedParameter>& parameters() const noexcept { return parameters_; }
  int traverse(visitproc visit, void* arg) const;
  /// Lets go of objects; nothing may be read afterwards.
  void clear() noexcept;

  /// The types (tl.constexpr, JITFunction) whose objects are compiled in wherever they are given. Once; owned for ever.
  static void set_constant_types(PyObject* constexpr_type, PyObject* function_type);

 private:
  CallForm make_form(size_t positional, PyObject* keyword_names, bool is_run);
  bool read_given(size_t index, const GivenValue& given, AdoptedCall& call, size_t& count, const char*& reason) const;
  bool classify(const AdoptedParameter& parameter, PyObject* object, DeviceSlot slot, uint16_t& code, uint64_t& value,
                const char*& reason);
  bool read_tuple(PyObject* tuple, DeviceSlot slot, AdoptedCall& call, uint16_t& code, const char*& reason);

  std::vector<AdoptedParameter> parameters_;
  bool may_lack_;
  ConstantTable constants_;
  std::vector<CallForm*> forms_;  ///< the last one used first
  std::vector<std::vector<PyObject*>> option_sets_;
};

}  // namespace hdispatch
