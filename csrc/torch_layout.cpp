// torch_layout.cpp -- reading a tensor's object both ways.
#include "torch_layout.h"

#include <ATen/ops/empty.h>
#include <torch/version.h>

#include "check.h"
#include "torch_python.h"

namespace hdispatch {

void check_torch_layout() {
  const at::Tensor tensor = at::empty({0});
  PyObject* object = wrap_tensor(tensor);
  if (!object) throw_python_error();
  // Read as an address: were it none of a tensor, to use it would crash.
  const void* found = *reinterpret_cast<void* const*>(&tensor_of(object));
  const bool is_same = is_tensor_object(object) && found == tensor.unsafeGetTensorImpl();
  Py_DECREF(object);
  if (!is_same)
    fail(Fault::kInternal, "an object of a tensor does not begin as torch ", TORCH_VERSION,
         "'s do, for which hdispatch was compiled; install hdispatch for the torch that is here");
}

}  // namespace hdispatch
