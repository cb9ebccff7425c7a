// sequence_call.h -- the door of a sequence: a Python object with a vectorcall slot, and its plans.
//
// A call reads the slots, finds the plan of its M and layout or resolves one, lets go of the GIL once and launches.
// Where a step has no row, all steps are made one by one, each with its own fallback, and the miss is counted under the
// sequence's name; in strict mode nothing is launched and the miss is raised.
//
// Plans and arenas are looked up with the GIL held. A plan is one call's at a time: a second thread gets its own.
#pragma once

#include <Python.h>
#include <pybind11/pybind11.h>

#include <map>
#include <memory>
#include <string>

#include "arena.h"
#include "op_call.h"

namespace hdispatch {

/// Makes the Python type; once, at import. Null with a Python error set on failure.
PyObject* make_sequence_type();

/// A callable from its description, as hdispatch/sequence.py gives it. `as_op` checks that an object is an op.
PyObject* make_sequence(PyObject* type, const std::string& name, const pybind11::list& slots,
                        const pybind11::list& temps, const pybind11::list& steps, int64_t max_rows,
                        std::shared_ptr<Arena> arena, const OpObject& (*as_op)(const pybind11::handle&));

/// Describes a call, one line a step, without launching it.
std::string explain_sequence(PyObject* sequence, const pybind11::args& args, const pybind11::kwargs& by_name);

/// name -> counters of all sequences that were made; sequences of one name share them.
std::map<std::string, OpCounters*> sequence_counters();

}  // namespace hdispatch
