"""The Triton kernel of dynamic_per_token_scaled_fp8_quant, for every K: a block of columns of each row stays in registers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from hdispatch.opspec import Variant

from ..lib.triton_fp8 import bounded, clamp_rows, divide_rows, row_scale, widened
from ..lib.triton_rows import looped, options, programs, warps_for, whole

GENERIC = ("K",)
INDEX_BITS = 64


@triton.jit
def dynamic_per_token_scaled_fp8_quant(
    result,
    input,
    scale,
    scale_ub,
    m,
    k,
    row_stride,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    LOOP: tl.constexpr,
    PDL: tl.constexpr,
):
    """LOOP: k may exceed BLOCK; then the rest of a row is read twice."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    source = input + row[:, None] * row_stride
    target = result + row[:, None] * k
    columns = tl.arange(0, BLOCK)[None, :]
    inside = (row < m)[:, None]
    first = inside & (columns < k)
    if PDL:
        tl.extra.cuda.gdc_wait()
    x = widened(tl.load(source + columns, mask=first, other=0.0))
    largest = tl.abs(x)
    if LOOP:
        for start in range(BLOCK, k, BLOCK):
            more = tl.load(source + start + columns, mask=inside & (start + columns < k), other=0.0)
            largest = tl.maximum(largest, tl.abs(widened(more)))
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
        for start in range(BLOCK, k, BLOCK):
            rest = inside & (start + columns < k)
            x = widened(tl.load(source + start + columns, mask=rest, other=0.0))
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
    """One program per `rows` rows. Of K at most `block` unless the config has `loop`."""
    m, k = input.size(0), input.size(1)
    _launcher(
        dynamic_per_token_scaled_fp8_quant,
        programs(m, config),
        result,
        input,
        scale,
        scale_ub,
        m,
        k,
        input.stride(0),
        **options(config, k),
    )


def candidates(sizes: dict[str, int], _variant: Variant) -> list[dict[str, Any]]:
    """Configs worth measuring. `sizes` without K: for every K."""
    if "K" not in sizes:
        return looped((8192, 8), (4096, 8), (4096, 4), (8192, 16), (2048, 4), (1024, 4))
    return whole(sizes["K"], warps_for(sizes["K"], (1, 2) if sizes["M"] >= 256 else (1,)))
