"""The Triton kernel of dynamic_per_token_scaled_fp8_quant, for every K: a block of columns of each row stays in registers."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from hdispatch.opspec import Variant

from ..lib.triton_fp8 import widened
from ..lib.triton_rows import looped, quantize, quantize_rows, warps_for, whole

GENERIC = ("K",)


@triton.jit
def _loaded(source, start, columns, _n, mask):
    return widened(tl.load(source + start + columns, mask=mask, other=0.0))


@triton.jit
def dynamic_per_token_scaled_fp8_quant(
    result, input, scale, scale_ub, m, k, row_stride,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, LOOP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """See `quantize_rows`."""
    quantize_rows(_loaded, result, input, scale, scale_ub, m, k, row_stride, ROWS, BLOCK, LOOP, PDL)


def launch(result, input, scale, scale_ub, *, config, _launcher):
    """One program per `rows` rows."""
    quantize(dynamic_per_token_scaled_fp8_quant, result, input, scale, scale_ub, config, _launcher)


def candidates(sizes: dict[str, int], _variant: Variant) -> list[dict[str, Any]]:
    """Configs worth measuring. `sizes` without K: for every K."""
    if "K" not in sizes:
        return looped((8192, 8), (4096, 8), (4096, 4), (8192, 16), (2048, 4), (1024, 4))
    return whole(sizes["K"], warps_for(sizes["K"], (1, 2) if sizes["M"] >= 256 else (1,)))
