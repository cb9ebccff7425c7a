"""Let a TVM-FFI function serve calls of an op: from CuteDSL, FlashInfer, tilelang, or C++ as here.

python examples/register_function.py     needs 'hdispatch[ffi]' and a C++ compiler; on CPU tensors, with the null driver
"""

from __future__ import annotations

import hdispatch
import torch
import tvm_ffi.cpp

SOURCE = """
void fill(tvm::ffi::TensorView result, tvm::ffi::TensorView input) {
  auto* out = static_cast<uint16_t*>(result.data_ptr());
  for (int64_t i = 0; i < result.size(0) * result.size(1); ++i) out[i] = 0x3f80;  // 1 in bfloat16
}
"""


def main() -> None:
    """Register, call, unregister."""
    module = tvm_ffi.cpp.load_inline("example", cpp_sources=SOURCE, functions="fill")
    key = hdispatch.Key("bfloat16", N=12288)
    registration = hdispatch.register("silu_and_mul", key, module.fill, stream="none", label="fill", driver="null")
    x, out = torch.randn(3, 2 * 12288, dtype=torch.bfloat16), torch.zeros(3, 12288, dtype=torch.bfloat16)
    with hdispatch.strict():
        hdispatch.ops.silu_and_mul(out, x)
    print(out.float().unique().tolist(), hdispatch.stats()["silu_and_mul"]["hits"])
    registration.unregister()


if __name__ == "__main__":
    main()
