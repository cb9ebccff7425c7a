"""The Triton kernel of silu_and_mul_dynamic_per_token_quant, for every N: a block of columns of a row stays in registers."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from hdispatch.opspec import Variant

from ..lib.triton_fp8 import silu, widened
from ..lib.triton_rows import looped, quantize, quantize_rows, warps_for, whole

GENERIC = ("N",)


@triton.jit
def _activated(gates, start, columns, n, mask):
    """silu(gate) * up in float32; up is n elements behind gate."""
    gate = widened(tl.load(gates + (start + columns), mask=mask, other=0.0))
    up = widened(tl.load(gates + n + (start + columns), mask=mask, other=0.0))
    return silu(gate) * up


@triton.jit
def silu_and_mul_dynamic_per_token_quant(
    result, input, scale, scale_ub, m, n, row_stride,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, LOOP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """See `quantize_rows`."""
    quantize_rows(_activated, result, input, scale, scale_ub, m, n, row_stride, ROWS, BLOCK, LOOP, PDL)


def launch(result, input, scale, scale_ub, *, config, _launcher):
    """One program per `rows` rows."""
    quantize(silu_and_mul_dynamic_per_token_quant, result, input, scale, scale_ub, config, _launcher)


def candidates(sizes: dict[str, int], _variant: Variant) -> list[dict[str, Any]]:
    """Configs worth measuring. `sizes` without N: for every N."""
    if "N" not in sizes:
        return looped((4096, 8), (8192, 16), (8192, 8), (4096, 4), (2048, 4), (16384, 32))
    return whole(sizes["N"], warps_for(sizes["N"]))
