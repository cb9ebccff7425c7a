"""The kernel of tma_matmul and its host function: one record for every K and N."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

GENERIC = ("K", "N")


@triton.jit
def kernel(result, input, weight, k, PDL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr):
    row, column = tl.program_id(0) * ROWS, tl.program_id(1) * COLUMNS
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
    for start in range(0, k, DEPTH):
        total = tl.dot(input.load([row, start]), weight.load([column, start]).T, total)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    result.store([row, column], total.to(tl.bfloat16))


def launch(
    result: torch.Tensor, input: torch.Tensor, weight: torch.Tensor, *, config: dict[str, Any], _launcher: Callable[..., None]
) -> None:
    m, k = input.shape
    n = weight.size(1)
    rows, columns, depth = config["ROWS"], config["COLUMNS"], config["DEPTH"]
    by_column = weight.t()
    _launcher(
        kernel,
        ((m + rows - 1) // rows, (n + columns - 1) // columns),
        TensorDescriptor(result, [m, n], [n, 1], [rows, columns]),
        TensorDescriptor(input, [m, k], [input.stride(0), 1], [rows, depth]),
        TensorDescriptor(by_column, list(by_column.shape), [by_column.stride(0), 1], [columns, depth]),
        k,
        PDL=True,
        ROWS=rows,
        COLUMNS=columns,
        DEPTH=depth,
        num_warps=4,
        num_stages=3,
        launch_pdl=True,
    )
