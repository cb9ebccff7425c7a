// op_call.h -- the door of an op from Python, an object with a vectorcall slot; and what all doors do about a miss.
//
//   hdispatch.ops.<op>          OpObject, here: the fast path, of plain CPU and CUDA tensors, no modes.
//                               A call with any other tensor goes to the torch door.
//   torch.ops.hdispatch.<op>    torch_op.h: boxed kernels, the same three classes for every op.
//
// Each fills a `Call` and asks Runtime::dispatch; on a miss both run the op's fallback or, in strict mode, throw.
// An op that returns tensors has doors of its own around these: functional_op.h.
#pragma once

#include <Python.h>

#include <atomic>
#include <functional>
#include <string>
#include <vector>

#include "runtime.h"

namespace hdispatch {

/// The Python object behind `hdispatch.ops.<op>`. Immortal: ops are never undefined.
struct OpObject {
  PyObject_HEAD vectorcallfunc vectorcall;
  const Op* op;
  PyObject* fallback;   ///< callable(*args), writes the mutated arguments
  PyObject* torch_op;   ///< torch.ops.hdispatch.<op>
  PyObject* doc;        ///< str
  PyObject* signature;  ///< inspect.Signature
};

/// The GIL, as what the caller of `Runtime::dispatch` holds. A daemon thread that asks for it back while the
/// interpreter ends is unwound from there (abi::__forced_unwind).
inline constexpr CallerLock kGil = {[]() -> void* { return PyEval_SaveThread(); },
                                    [](void* state) { PyEval_RestoreThread(static_cast<PyThreadState*>(state)); }};

/// Makes the Python type; once, at import. Null with a Python error set on failure.
PyObject* make_op_type();

/// Defines the op in the runtime and in torch's dispatcher and returns its new OpObject. GIL held.
OpObject* make_op(PyObject* type, const Op& op, PyObject* fallback, PyObject* doc, PyObject* signature);

/// Makes `function` the type's `__call__` attribute. torch.compile traces that attribute, which it cannot where it is
/// C; a call never looks it up, so that calls stay as fast as they are.
void set_traced_call(PyObject* type, PyObject* function);

/// Fills a Call from all arguments, as Python gives them; false if one of them needs the torch door. Throws kCaller for
/// a wrong type. `grad` becomes true if a tensor requires grad.
bool read_arguments(const Op& op, PyObject* const* args, Call& call, bool& grad);
/// The same of the first `count` arguments; throws kCaller for a tensor that requires grad while grad mode is on.
bool fill_call(const Op& op, PyObject* const* args, size_t count, Call& call);
inline bool fill_call(const Op& op, PyObject* const* args, Call& call) {
  return fill_call(op, args, op.args().size(), call);
}

inline bool is_done(Outcome outcome) noexcept { return outcome == Outcome::kLaunched || outcome == Outcome::kEmpty; }

/// What a miss is counted by.
std::string reason_of(const Op& op, const Call& call, Outcome outcome, const Dispatch& found);

/// The miss: counts it and throws in strict mode, and for a wrong call or a failed launch in any. Returns if the
/// fallback is to run. A call without rows is no miss: `fell_back` counts it.
HD_COLD void miss(const Op& op, const Call& call, Outcome outcome, const Dispatch& found);
/// After a fallback that raised nothing.
void fell_back(const Op& op, Outcome outcome);

/// Runs the op's fallback; null with a Python error set if it raises. Its answer does not depend on what the caller has
/// switched on: autocast would change its arithmetic, and outside inference mode it could not write to an inference
/// tensor, which a kernel can.
HD_COLD PyObject* call_fallback(const OpObject* self, PyObject* const* args);

/// Throws for an argument that requires grad while grad mode is on.
[[noreturn]] HD_COLD void requires_grad(const Op& op, const ArgSpec& arg);

/// Counts a miss. In strict mode throws kMiss with `describe()`; else the fallback is to run.
void count_miss(const Op& op, const std::string& reason, const std::function<std::string()>& describe);

}  // namespace hdispatch
