"""An autotuned Triton kernel, served from C++ by one line: its choice for each `n` is part of the key.

python examples/adopt_autotuned.py     needs Triton and a GPU; without a GPU it says what it would do
"""

from __future__ import annotations

import hdispatch
import torch
import triton
import triton.language as tl


@hdispatch.adopt  # the one line
@triton.autotune([triton.Config({"BLOCK": 128}, num_warps=2), triton.Config({"BLOCK": 1024}, num_warps=8)], key=["n"])
@triton.jit
def scale(x, out, n, factor, BLOCK: tl.constexpr):
    """out = x * factor."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i, i < n) * factor, i < n)


def main() -> None:
    """Three calls of two sizes: the first of each is tuned and launched by Triton, the others come from C++."""
    if not torch.cuda.is_available():
        print(f"{scale.fn.__name__} is adopted; calling it needs a GPU")
        return
    for n in (1000, 4096):
        x = torch.arange(float(n), device="cuda")
        out = torch.empty_like(x)
        for _ in range(3):
            scale[lambda meta, n=n: (triton.cdiv(n, meta["BLOCK"]),)](x, out, n, 2.0)
        torch.testing.assert_close(out, 2 * x)
    print(next(each for name, each in hdispatch.stats().items() if name.startswith("adopted ")))


if __name__ == "__main__":
    main()
