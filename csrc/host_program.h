// host_program.h -- what a small Python function computes from a call's arguments, as a program: grids and heuristics.
//
// `kernel[lambda meta: (triton.cdiv(n, meta["BLOCK"]),)]` costs two microseconds in Python. Python traces such a
// function once (hdispatch/adopted/host_program.py): what it reads, what it took each of them to be, and integer
// expressions. The program holds for every call where those facts hold; for any other the function is traced again, or
// called.
#pragma once

#include <Python.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "check.h"

namespace hdispatch {

/// Where a function's names lead: arguments by parameter, what configurations give, the function itself.
struct HostInputs {
  PyObject* function;        ///< a Python function
  PyObject* const* objects;  ///< by parameter; null: absent
  PyObject* constants;       ///< dict, or null: of parameters that are absent
};

/// A result of a program.
struct HostValue {
  enum class Kind : uint8_t { kInteger, kBool, kObject } kind;
  int64_t integer;
  PyObject* object;  ///< borrowed from the program
};

/// Where the integers of a call have what is known of each object that is a tensor: its sizes, its strides, the number
/// of its elements, whether it is contiguous, in this order.
struct HostLayout {
  struct Place {
    size_t first = 0;
    size_t rank = 0;
    bool is_tensor = false;
  };
  std::vector<Place> places;  ///< by object
};

/// What an integer of a call must be: from `least` to `most`, but not `except`.
struct HostRange {
  size_t integer;
  int64_t least = INT64_MIN;
  int64_t most = INT64_MAX;
  int64_t except = INT64_MIN;  ///< no size or stride; none

  bool holds(const int64_t* integers) const noexcept {
    const int64_t value = integers[integer];
    return value >= least && value <= most && value != except;
  }
  /// Both, of one integer. False if it takes two.
  bool merge(const HostRange& other) noexcept;
};

/// An integer expression in postfix order, over integers and the sizes of tensors.
class HostSteps {
 public:
  static constexpr size_t kMaxDepth = 16;

  HostSteps() = default;
  /// [(op, a, b)]. Throws python_error.
  explicit HostSteps(PyObject* listed);
  /// The same over integers alone.
  HostSteps(PyObject* listed, const HostLayout& layout);

  /// False where Python would raise, or 64 bits do not hold a value. `objects` are exact tensors where a step reads
  /// one.
  bool compute(const int64_t* integers, PyObject* const* objects, int64_t& out) const {
    if (HD_LIKELY(steps_.size() == 1 && steps_[0].op <= Op::kInteger)) {
      out = steps_[0].op == Op::kConst ? steps_[0].a : integers[steps_[0].a];
      return true;
    }
    return compute_steps(integers, objects, out);
  }

  /// For a fact: what one integer must be for it to hold; none if it is no such fact.
  std::optional<HostRange> as_range() const;

 private:
  enum class Op : uint8_t {
    kConst,
    kInteger,
    kNumel,
    kSize,
    kStride,
    kContiguous,
    kAdd,
    kSub,
    kMul,
    kDiv,
    kMod,
    kMin,
    kMax,
    kEq,
    kNe,
    kLt,
    kLe,
    kGt,
    kGe,
    kNextPowerOf2,
    kAnd,
    kOr,
  };
  struct Step {
    Op op;
    int64_t a;  ///< a constant; which integer or object; of an operator whose right side is a constant, that one
    int32_t b;  ///< of a size or stride the dimension; of an operator 1 where its right side is a constant
  };

  void place(Step& step, const HostLayout& layout) const;
  /// An operator of two sides. False where Python would raise, or 64 bits do not hold the value.
  static bool apply(Op op, int64_t left, int64_t right, int64_t& out) noexcept;
  bool compute_steps(const int64_t* integers, PyObject* const* objects, int64_t& out) const;

  std::vector<Step> steps_;
};

class HostProgram {
 public:
  static constexpr size_t kMaxSources = 16;
  static constexpr size_t kMaxOutputs = 3;

  /// ([(kind, key, guard, object)], [[(op, a, b)]], [object or bool flag]) as Python says. Throws python_error.
  explicit HostProgram(PyObject* made);
  ~HostProgram();
  HostProgram(const HostProgram&) = delete;
  HostProgram& operator=(const HostProgram&) = delete;

  /// False if a fact does not hold, or a value does not fit 64 bits: the function has to be called.
  bool run(const HostInputs& inputs, HostValue* out) const;
  size_t outputs() const noexcept { return outputs_.size(); }
  int traverse(visitproc visit, void* arg) const;

 private:
  enum class SourceKind : uint8_t { kParameter, kCell, kDefault, kGlobal };
  enum class Guard : uint8_t { kInteger, kObject, kTensor, kAbsent };
  struct Source {
    SourceKind kind;
    Guard guard;
    uint16_t index;
    PyObject* name;    ///< owned; of a parameter or global
    PyObject* object;  ///< owned; of kObject
  };
  struct Output {
    HostValue::Kind kind;
    PyObject* object;  ///< owned
    HostSteps steps;
  };

  PyObject* find(const Source& source, const HostInputs& inputs) const;
  std::vector<Source> sources_;
  std::vector<Output> outputs_;
};

/// The programs of one kernel's functions, by their code.
class HostPrograms {
 public:
  HostPrograms() = default;
  ~HostPrograms() { clear(); }
  HostPrograms(const HostPrograms&) = delete;
  HostPrograms& operator=(const HostPrograms&) = delete;

  /// Fills `out` if the function has a program that holds. `trace` is asked where it might get one:
  /// (kernel, function, arguments) -> what HostProgram takes, or None. `make_arguments` gives a new dict.
  template <typename MakeArguments>
  bool run(const HostInputs& inputs, PyObject* trace, PyObject* kernel, const MakeArguments& make_arguments,
           HostValue* out, size_t& count) {
    if (!PyFunction_Check(inputs.function)) return false;
    Known* known = find(inputs.function);
    if (HD_UNLIKELY(!known)) return false;
    for (const auto& each : known->programs) {
      if (HD_UNLIKELY(!each->run(inputs, out))) continue;
      count = each->outputs();
      return true;
    }
    if (HD_LIKELY(known->attempts >= kMaxAttempts)) return false;
    const HostProgram* made = add(*known, inputs.function, trace, kernel, make_arguments());
    if (!made || !made->run(inputs, out)) return false;
    count = made->outputs();
    return true;
  }

  int traverse(visitproc visit, void* arg) const;
  void clear() noexcept;

 private:
  static constexpr size_t kMaxCodes = 16;
  static constexpr uint32_t kMaxAttempts = 8;

  struct Known {
    PyObject* code;     ///< owned
    PyObject* globals;  ///< borrowed: compared alone
    uint32_t attempts = 0;
    std::vector<std::unique_ptr<HostProgram>> programs;
  };

  Known* find(PyObject* function);
  const HostProgram* add(Known& known, PyObject* function, PyObject* trace, PyObject* kernel, PyObject* arguments);

  std::vector<std::unique_ptr<Known>> known_;
};

}  // namespace hdispatch
