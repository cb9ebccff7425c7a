// adopted_host.h -- a host function of somebody else's, as data: a call of a Helion kernel without its Python.
//
// Helion's call finds a compiled variant, then runs generated Python that allocates results and launches one Triton
// kernel. A `HostRecord` is what that Python does for calls of one kind: results, grid and arguments as expressions in
// the sizes of its tensors (hdispatch/adopted/helion_record.py says which calls, and proves it). Or for one exact
// shape, where the compiled variant depends on it. The launch itself is the adopted Triton kernel's: its key, its row.
#pragma once

#include <Python.h>
#include <c10/core/Scalar.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "adopted_kernel.h"
#include "host_program.h"

namespace hdispatch {

inline constexpr size_t kMaxHostArguments = 32;

/// What a host function does. Made from what Python says; holds it.
class HostRecord {
 public:
  /// A dict: see hdispatch/adopted/helion_record.py. `layout` is of the words of a call of its kind. Throws
  /// python_error.
  HostRecord(PyObject* made, const HostLayout& layout);
  HostRecord(const HostRecord&) = delete;
  HostRecord& operator=(const HostRecord&) = delete;

  /// Only calls of exactly these sizes and strides.
  bool is_exact() const noexcept { return is_exact_; }
  /// What Helion's function of the arguments must say of a call; null: Helion asks none. Borrowed.
  PyObject* choice() const noexcept { return choice_; }
  /// Whether the facts hold that the record assumes, but for the choice. `words` are those of the call's key.
  bool holds(const uint64_t* words);
  /// The result of the call, new; null without a Python error and with the reason if it was not launched.
  PyObject* run(PyObject* const* args, const uint64_t* words, const char*& reason) const;
  int traverse(visitproc visit, void* arg) const;

 private:
  struct Output {
    std::vector<HostSteps> sizes;
    std::vector<HostSteps> strides;
    int8_t scalar_type;
    uint16_t like;                    ///< on the device of this argument
    std::optional<c10::Scalar> fill;  ///< `zeros`, `full`; none: left as it is
  };
  /// What `view` or `reshape` of an output is.
  struct View {
    size_t output;
    std::vector<HostSteps> sizes;
    std::vector<HostSteps> strides;
    HostSteps offset;
  };
  struct Param {
    enum class Kind : uint8_t { kObject, kInteger, kArgument, kOutput } kind;
    uint16_t index;  ///< of the argument or output
    int8_t scalar_type;
    HostSteps value;  ///< or offset in bytes
  };

  Owned source_;  ///< the dict, which holds all objects
  bool is_exact_ = false;
  PyObject* choice_ = nullptr;  ///< held by the dict
  std::vector<HostRange> ranges_;
  std::vector<HostSteps> guards_;  ///< facts that are no ranges
  std::vector<Output> outputs_;
  std::vector<HostSteps> grid_;
  std::vector<Param> params_;
  std::vector<PyObject*> objects_;  ///< of params (None where they are computed), then options; borrowed
  AdoptedKernel* function_ = nullptr;
  const CallForm* form_ = nullptr;
  WatchedDict variant_;      ///< the compiled variant's dict
  PyObject* run_ = nullptr;  ///< its host function; borrowed
  int result_ = -1;          ///< 0: the one of `results_`; -1: listed; -2: None
  std::vector<View> views_;
  std::vector<int> results_;  ///< outputs from 0, then views; arguments as -1 - index
  bool is_tuple_ = false;
};

/// What tells calls of one kind from others (the kinds of arguments, values that are no tensors), then of each tensor
/// its sizes, its strides, the number of its elements, whether it is contiguous.
struct HostKey {
  static constexpr size_t kMaxRank = 8;
  static constexpr size_t kMaxWords = 1 + kMaxHostArguments * (1 + 2 * kMaxRank + 2);

  size_t kind;   ///< words of the kind
  size_t count;  ///< and with those of the shapes
  uint64_t words[kMaxWords];

  /// Of the kind alone, or of all. Not kept: the usual call needs neither.
  uint64_t hash(bool is_exact) const noexcept {
    uint64_t hash = 0;
    for (size_t i = 0; i < (is_exact ? count : kind); ++i) hash = mix_word(hash, words[i]);
    return hash;
  }
};

/// One kind of call, or one shape: a record, or why there is none; and why it is of one shape only.
struct HostEntry {
  std::vector<uint64_t> words;
  std::shared_ptr<HostRecord> record;
  std::string reason;
  bool is_of_kind = false;              ///< of any shape of its kind
  bool is_chosen = false;               ///< a shape for which Helion's function has chosen a record of another entry
  mutable bool has_come_again = false;  ///< a call has found it

  bool is_for(const uint64_t* given, size_t count) const noexcept {
    return words.size() == count && std::equal(given, given + count, words.data());
  }
};

/// By the hash of the kind alone, or with the shapes.
using HostTable = std::unordered_multimap<uint64_t, std::unique_ptr<HostEntry>>;

/// The Python object behind an adopted host kernel, in the kernel's `__dict__`.
struct HostKernel {
  PyObject_HEAD PyObject* kernel;  ///< borrowed
  PyObject* call_function;         ///< the class's own `__call__`; owned for ever
  bool is_on;
  bool is_null;
  std::string* name;
  KeyReader* constants;
  WatchedState* state;
  OpCounters* counters;
  HostTable* table;
  const HostEntry* recent;  ///< the entry of `table` that served the last call; null: none
  size_t lonely;            ///< entries of `table` that have not come again
  WatchedDict variants;     ///< of Helion, whose launches are adopted; null: none was looked at

  PyObject* call(PyObject* args, PyObject* keywords);
};

extern PyObject* host_kernel_type;

/// Makes the Python type; once, at import.
void make_host_kernel_type();

/// The host kernels that are alive.
std::vector<HostKernel*>& host_kernels();

HostKernel* make_host_kernel(PyObject* kernel, const std::string& name, PyObject* call_function, bool is_null);

}  // namespace hdispatch
