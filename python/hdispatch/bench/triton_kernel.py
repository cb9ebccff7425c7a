"""A small Triton kernel with five pointers, launched as Triton users do: the peer whose cost is Triton's launcher alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

WIDTH = 128


@triton.jit  # type: ignore[untyped-decorator]
def five_pointers(result, left, right, scale, residual, rows, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Row of the program: result = left * right * scale + residual."""
    row = tl.program_id(0)
    at = row * WIDTH + tl.arange(0, WIDTH)
    inside = (at >= 0) & (row < rows)
    product = tl.load(left + at, inside) * tl.load(right + at, inside) * tl.load(scale + row, row < rows)
    tl.store(result + at, product + tl.load(residual + at, inside), inside)


def launcher(rows: int, device: torch.device) -> Callable[[int], None]:
    """Launches the kernel on as many rows as the call says, at most `rows`."""
    result, left, right, residual = (torch.zeros(rows, WIDTH, device=device) for _ in range(4))
    scale = torch.ones(rows, device=device)

    def launch(m: int) -> None:
        five_pointers[(m,)](result, left, right, scale, residual, m, WIDTH)

    return launch
