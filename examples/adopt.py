"""A Triton kernel and its launch as they were, served from C++ by one line.

python examples/adopt.py     needs Triton and a GPU; without a GPU it says what it would do
"""

from __future__ import annotations

import hdispatch
import torch
import triton
import triton.language as tl


@hdispatch.adopt  # the one line
@triton.jit
def scale(x, out, n, factor, BLOCK: tl.constexpr):
    """out = x * factor."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i, i < n) * factor, i < n)


def main() -> None:
    """Three calls: the first is Triton's, the others come from C++."""
    if not torch.cuda.is_available():
        print(f"{scale.__name__} is adopted; calling it needs a GPU")
        return
    x = torch.arange(1000.0, device="cuda")
    out = torch.empty_like(x)
    for _ in range(3):
        scale[lambda meta: (triton.cdiv(x.numel(), meta["BLOCK"]),)](x, out, x.numel(), 2.0, BLOCK=256)
    torch.testing.assert_close(out, 2 * x)
    print(next(each for name, each in hdispatch.stats().items() if name.startswith("adopted ")))


if __name__ == "__main__":
    main()
