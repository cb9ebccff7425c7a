// torch_op.h -- the torch door of an op: torch.ops.hdispatch.<op>.
#pragma once

#include <cstddef>

#include "op_call.h"

namespace c10 {
struct IValue;
}

namespace hdispatch {

/// Defines the op in torch's dispatcher; its kernels keep `self` for the life of the process.
void register_in_torch(const OpObject* self);

/// Fills a Call from the first `given` arguments, as torch's dispatcher has them; the others have defaults.
void fill_call(const Op& op, const c10::IValue* values, size_t given, Call& call);

/// Bumps the version counters of what the op writes: autograd cannot see our writes, and torch's in-place ops do so.
void bump_versions(const Op& op, const c10::IValue* values);

}  // namespace hdispatch
