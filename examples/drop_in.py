"""Put the launch table under vLLM's own ops: code that calls torch.ops._C is served without a change.

    python examples/drop_in.py [BUNDLE]      default: $HDISPATCH_BUNDLE, else the installation's own bundle

Without a GPU an op of the same name stands in for vLLM's, and the null driver does everything but the launch.
"""

from __future__ import annotations

import sys

import hdispatch
import torch
from hdispatch.integrations.vllm import Override, Route

if torch.cuda.is_available():
    import vllm._custom_ops  # noqa: F401  (loads torch.ops._C)

    DEVICE, DRIVER, OVERRIDE = "cuda", "cuda", hdispatch.override_vllm_ops
else:
    library = torch.library.Library("_C", "DEF")
    library.define("silu_and_mul(Tensor! result, Tensor input) -> ()")
    library.impl("silu_and_mul", lambda _result, _input: print("vLLM's own kernel"), "CPU")
    DEVICE, DRIVER, OVERRIDE = "cpu", "null", lambda: Override("CPU", {"silu_and_mul": (Route("silu_and_mul"),)})


def main() -> None:
    """Call vLLM's op under the override, and after it."""
    hdispatch.load(sys.argv[1] if len(sys.argv) > 1 else None, driver=DRIVER)
    x = torch.randn(7, 2 * 12288, dtype=torch.bfloat16, device=DEVICE)
    out = torch.empty(7, 12288, dtype=torch.bfloat16, device=DEVICE)
    with OVERRIDE():
        torch.ops._C.silu_and_mul(out, x)
    print(hdispatch.stats()["silu_and_mul"])
    torch.ops._C.silu_and_mul(out, x)


if __name__ == "__main__":
    main()
