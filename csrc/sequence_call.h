// sequence_call.h -- the door of a sequence: a Python object with a vectorcall slot, its arena, its plans.
//
// A call reads the slots, finds the plan of its M and layout or resolves one, lets go of the GIL once and launches.
// Where a step has no row, all steps are made one by one, each with its own fallback, and the miss is counted under the
// sequence's name; in strict mode nothing is launched and the miss is raised.
//
// Plans and arenas are looked up with the GIL held. A plan is one call's at a time: a second thread gets its own.
#pragma once

#include <ATen/core/Tensor.h>
#include <Python.h>
#include <pybind11/pybind11.h>

#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "op_call.h"
#include "sequence_plan.h"

namespace hdispatch {

/// Memory for temporaries of sequences: one allocation of torch's per device and stream, made when a sequence first
/// runs there. A sequence that needs more gets a larger one; a smaller one that a plan or a captured graph may know is
/// kept as long as the arena. Or memory that is given, for all streams of its device.
class Arena {
 public:
  Arena() = default;
  /// Throws kCaller unless it is a whole allocation, of bytes.
  explicit Arena(at::Tensor memory);

  /// Which stream; the CPU has none, and a thread stands for one.
  using Lane = std::pair<DeviceSlot, uintptr_t>;

  /// Memory of at least that many bytes, aligned. GIL held.
  const at::Tensor& get(const Lane& lane, size_t bytes);
  /// Held while launches of one call are made: those of two threads on one stream, in turn, would write each other's
  /// temporaries. A foreign step may call a sequence. GIL held; the mutex is waited for without it.
  std::recursive_mutex& turn(const Lane& lane) { return turns_[lane]; }
  /// Bytes of all allocations.
  size_t bytes() const;

 private:
  at::Tensor given_;                              ///< undefined: an allocation per stream
  std::map<Lane, std::vector<at::Tensor>> made_;  ///< the largest last
  std::map<Lane, std::recursive_mutex> turns_;
};

/// Of a torch.Tensor, or None.
std::shared_ptr<Arena> make_arena(const pybind11::object& memory);

/// `bytes` of torch's memory on a device, aligned as temporaries are.
at::Tensor allocate(DeviceSlot device, size_t bytes);

/// Makes the Python type; once, at import. Null with a Python error set on failure.
PyObject* make_sequence_type();

/// A callable from its description, as hdispatch/sequence.py gives it. `as_op` checks that an object is an op.
PyObject* make_sequence(PyObject* type, const std::string& name, const pybind11::list& slots,
                        const pybind11::list& temps, const pybind11::list& steps, int64_t max_rows,
                        std::shared_ptr<Arena> arena, const OpObject& (*as_op)(const pybind11::handle&));

/// A call in words, one line a step, without launching it.
std::string explain_sequence(PyObject* sequence, const pybind11::args& args);

/// name -> counters of all sequences that were made; sequences of one name share them.
std::map<std::string, OpCounters*> sequence_counters();

}  // namespace hdispatch
