"""The kernel of tma_copy and its host function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

INDEX_BITS = 32


@triton.jit
def kernel(result, shifted, PDL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row, column = tl.program_id(0) * ROWS, tl.program_id(1) * COLUMNS
    if PDL:
        tl.extra.cuda.gdc_wait()
    tile = shifted.load([row, column])
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    result.store([row, column], tile)


def launch(result: torch.Tensor, input: torch.Tensor, *, config: dict[str, Any], _launcher: Callable[..., None]) -> None:
    m, k = result.shape
    block = [config["ROWS"], config["COLUMNS"]]
    _launcher(
        kernel,
        ((m + block[0] - 1) // block[0], (k + block[1] - 1) // block[1]),
        TensorDescriptor(result, [m, k], [k, 1], block),
        TensorDescriptor.from_tensor(input[:, 8:], block),
        PDL=True,
        ROWS=block[0],
        COLUMNS=block[1],
        num_warps=4,
        launch_pdl=True,
    )
