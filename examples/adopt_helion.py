"""A Helion kernel, served from C++ by one line, at an M that it has never seen too.

python examples/adopt_helion.py     needs Helion and a GPU; without a GPU it says what it would do
"""

from __future__ import annotations

import hdispatch
import helion
import helion.language as hl
import torch


@hdispatch.adopt  # the one line
@helion.kernel(static_shapes=False, config=helion.Config(block_sizes=[32, 32]))
def add(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """x + y, of one shape."""
    out = torch.empty_like(x)
    for tile in hl.tile(x.size()):
        out[tile] = x[tile] + y[tile]
    return out


def main(device: str = "cuda") -> None:
    """Helion makes the first call; Triton tells multiples of 16 from other Ms; from then on every M comes from C++."""
    if device == "cuda" and not torch.cuda.is_available():
        print(f"{add.fn.__name__} is adopted; calling it needs a GPU")
        return
    for m in (7, 7, 16, 16, *range(2, 100)):
        x, y = torch.randn(m, 64, device=device), torch.randn(m, 64, device=device)
        result = add(x, y)
        if device == "cuda":
            torch.testing.assert_close(result, x + y)
    print(hdispatch.explain(add))


if __name__ == "__main__":
    main()
