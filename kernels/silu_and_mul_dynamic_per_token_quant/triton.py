"""The Triton kernel of silu_and_mul_dynamic_per_token_quant, for every N: a block of columns of a row stays in registers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from hdispatch.opspec import Variant

from ..lib.triton_fp8 import bounded, clamp_rows, divide_rows, row_scale, silu, widened
from ..lib.triton_rows import looped, options, programs, warps_for, whole

GENERIC = ("N",)
INDEX_BITS = 64


@triton.jit
def _activated(gates, columns, n, mask):
    """silu(gate) * up in float32; up is n elements behind gate."""
    gate = widened(tl.load(gates + columns, mask=mask, other=0.0))
    up = widened(tl.load(gates + n + columns, mask=mask, other=0.0))
    return silu(gate) * up


@triton.jit
def silu_and_mul_dynamic_per_token_quant(
    result,
    input,
    scale,
    scale_ub,
    m,
    n,
    row_stride,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    LOOP: tl.constexpr,
    PDL: tl.constexpr,
):
    """LOOP: n may exceed BLOCK; then the rest of a row is read, and activated, twice."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    source = input + row[:, None] * row_stride
    target = result + row[:, None] * n
    columns = tl.arange(0, BLOCK)[None, :]
    inside = (row < m)[:, None]
    first = inside & (columns < n)
    if PDL:
        tl.extra.cuda.gdc_wait()
    x = _activated(source, columns, n, first)
    largest = tl.abs(x)
    if LOOP:
        for start in range(BLOCK, n, BLOCK):
            more = _activated(source, start + columns, n, inside & (start + columns < n))
            largest = tl.maximum(largest, tl.abs(more))
    if scale_ub is not None:
        bound = tl.load(scale_ub)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    absmax = tl.max(largest, axis=1)
    if scale_ub is not None:
        absmax = bounded(absmax, bound)
    s = row_scale(absmax)
    tl.store(scale + row, s, mask=row < m)
    if scale_ub is not None:
        x = clamp_rows(x, s)
    tl.store(target + columns, divide_rows(x, s).to(tl.float8e4nv), mask=first)
    if LOOP:
        for start in range(BLOCK, n, BLOCK):
            rest = inside & (start + columns < n)
            x = _activated(source, start + columns, n, rest)
            if scale_ub is not None:
                x = clamp_rows(x, s)
            tl.store(target + start + columns, divide_rows(x, s).to(tl.float8e4nv), mask=rest)


def launch(
    result: torch.Tensor,
    input: torch.Tensor,
    scale: torch.Tensor,
    scale_ub: torch.Tensor | None,
    *,
    config: dict[str, Any],
    _launcher: Callable[..., None],
) -> None:
    """One program per `rows` rows. Of N at most `block` unless the config has `loop`."""
    m, n = result.size(0), result.size(1)
    _launcher(
        silu_and_mul_dynamic_per_token_quant,
        programs(m, config),
        result,
        input,
        scale,
        scale_ub,
        m,
        n,
        input.stride(0),
        **options(config, n),
    )


def candidates(sizes: dict[str, int], _variant: Variant) -> list[dict[str, Any]]:
    """Configs worth measuring. `sizes` without N: for every N."""
    if "N" not in sizes:
        return looped((4096, 8), (8192, 16), (8192, 8), (4096, 4), (2048, 4), (16384, 32))
    return whole(sizes["N"], warps_for(sizes["N"]))
