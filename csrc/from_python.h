// from_python.h -- ops and records from the dicts that Python gives, as the core takes them.
//
// A field that is missing, or of the wrong type, throws kBundle with its name.
#pragma once

#include <Python.h>
#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "table_builder.h"

namespace hdispatch {

/// The arguments and variants of an op.
struct OpParts {
  std::vector<ArgSpec> args;
  std::vector<Variant> variants;
};

/// From what `hdispatch.ops.define` gives. `workspace_bytes` are by variant; empty for an op without a workspace.
OpParts read_op(const std::string& name, const pybind11::list& args, const pybind11::list& variants,
                const std::vector<uint64_t>& workspace_bytes);

/// Adds a record of a manifest, of either kind, and returns its index. `function` is the handle of a live TVM-FFI
/// function, or 0 for the bundle's.
uint32_t add_record(TableBuilder& builder, const Op& op, const pybind11::dict& record, uintptr_t function);

}  // namespace hdispatch
