// torch_layout.h -- whether torch's objects of tensors are as torch_python.h declares them.
#pragma once

namespace hdispatch {

/// Throws unless a tensor's object begins as TensorObject does; once, at import.
void check_torch_layout();

}  // namespace hdispatch
