// override.h -- serving another library's op from the table: the drop-in.
//
// An `Override` puts one boxed kernel over the kernel that an op of another library has in torch's dispatcher for one
// device. A call that the table serves is launched; every other one, wrong ones included, runs that former kernel, and
// is counted. So every caller of the op is served: eager code, compiled code, C++. Calls from Python spend more time in
// torch's argument parser than here, so there is also a door that tries the table first and hands the rest to torch.
//
// torch reads its table of kernels without a lock, so a kernel that is taken away or put there while another thread
// calls the op is a crash. Ours is put there once and stays: `undo` and `resume` are one atomic store.
#pragma once

#include <Python.h>

#include <atomic>
#include <string>
#include <vector>

#include "torch_op.h"

namespace hdispatch {

/// How a matrix lies in memory.
enum class Form : uint8_t {
  kRows,     ///< contiguous
  kColumns,  ///< columns contiguous, at least a column's height apart
  kEither,   ///< rows; or columns, where the strides say so
  kPacked,   ///< columns, with nothing between them
};
inline constexpr const char* kFormNames[] = {"rows", "columns", "either", "packed"};

/// Where the overridden kernel does not read an argument's strides but presumes them, and ours reads them.
struct FormRule {
  uint8_t arg = 0;
  Form form = Form::kRows;
  int flag = -1;  ///< index of a flag: `form` where it is set, rows where it is not; -1: always `form`
};

/// One of our ops that may serve the call. Its arguments are the other op's, in order; those that only one of the two
/// has are the last, and have defaults: the other op's are served as None only.
struct Route {
  const Op* op = nullptr;
  std::vector<FormRule> rules;
  std::vector<uint8_t> padded;  ///< tensors that may have more rows than `rows`, which the overridden kernel leaves
  uint8_t rows = 0;             ///< the tensor that has the call's rows, where others are padded
};

/// Never freed: a call may be in it, on any thread, until the process ends.
class Override {
 public:
  Override(const Override&) = delete;
  Override& operator=(const Override&) = delete;

  /// Overrides `name` ("namespace::op") for CUDA or CPU tensors. Of its `given` arguments the first `required` have no
  /// default. Returns null if it has no kernel there yet. The first route that takes a call serves it. No other thread
  /// may be calling the op.
  static Override* make(const std::string& name, bool cuda, std::vector<Route> routes, size_t given, size_t required);

  /// From now on every call runs the former kernel. From any thread.
  void undo() noexcept { is_on_.store(false, std::memory_order_relaxed); }
  /// Ends `undo`, from any thread; false, and nothing happens, if the op has another kernel on top by now.
  bool resume();

  /// A new callable that serves plain positional calls and hands all others, and all during `undo`, to `otherwise`.
  PyObject* make_door(PyObject* otherwise) const;

 private:
  class Kernel;
  struct Door;
  struct Found;
  struct Former;
  static PyObject* call_door(PyObject* door, PyObject* const* args, size_t flags, PyObject* keyword_names);

  Override() = default;
  bool serve(PyObject* const* args, size_t count) const;
  bool serve(const c10::IValue* values) const;
  Outcome try_route(const Route& route, const c10::IValue* values, Found& found) const;
  void add_reason(const Route& route, const Found& found, std::string& reasons) const;
  void miss(const Route& route, Outcome outcome, const Found& found, const std::string& reasons) const;

  std::string name_;
  std::vector<std::string> names_;  ///< of the overridden op's arguments
  bool cuda_ = true;
  std::vector<Route> routes_;
  size_t given_ = 0;
  size_t required_ = 0;
  std::vector<std::vector<PyObject*>> defaults_;  ///< by route and argument; borrowed, null for none
  Former* former_ = nullptr;                      ///< owned
  std::atomic<bool> is_on_{true};
};

}  // namespace hdispatch
