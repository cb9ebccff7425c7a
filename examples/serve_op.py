"""Serve an op from the launch table, and see what it did.

    python examples/serve_op.py [BUNDLE]     default: $HDISPATCH_BUNDLE, else the installation's own bundle

On a GPU the kernel runs; without one the null driver does everything but the launch.
"""

from __future__ import annotations

import sys

import hdispatch
import torch


def main() -> None:
    """Call silu_and_mul of Qwen3-8B with a few batch sizes."""
    device, driver = ("cuda", "cuda") if torch.cuda.is_available() else ("cpu", "null")
    bundle = hdispatch.load(sys.argv[1] if len(sys.argv) > 1 else None, driver=driver)
    print(f"{bundle.rows} rows of {bundle.folder}")
    for m in (1, 7, 4000):  # any number of rows: each bucket has its own config, and nothing is compiled
        x = torch.randn(m, 2 * 12288, dtype=torch.bfloat16, device=device)
        out = torch.empty(m, 12288, dtype=torch.bfloat16, device=device)
        hdispatch.ops.silu_and_mul(out, x)
    print(hdispatch.explain(hdispatch.ops.silu_and_mul, out, x))
    print(hdispatch.stats()["silu_and_mul"])


if __name__ == "__main__":
    main()
