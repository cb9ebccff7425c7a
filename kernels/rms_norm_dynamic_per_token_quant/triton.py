"""The Triton kernel of rms_norm_dynamic_per_token_quant, for every K: a block of columns of each row stays in registers."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from hdispatch.opspec import Variant

from ..lib import triton_rows as lib
from ..lib.triton_fp8 import widened

GENERIC = ("K",)
EARLY_READS = ("weight",)


@triton.jit
def _sum(source, residual, columns, mask):
    """input, plus residual if there is one, in float32."""
    x = widened(tl.load(source + columns, mask=mask, other=0.0))
    if residual is not None:
        x += widened(tl.load(residual + columns, mask=mask, other=0.0))
    return x


@triton.jit
def _weighted(x, rstd, w):
    """(x * rstd rounded to the weights' dtype) * w, rounded again, in float32."""
    return ((x * rstd).to(w.dtype).to(tl.float32) * w.to(tl.float32)).to(w.dtype).to(tl.float32)


@triton.jit
def rms_norm_dynamic_per_token_quant(
    result, input, weight, scale, epsilon, scale_ub, residual, m, k, row_stride,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, LOOP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """LOOP: k may exceed BLOCK; then the rest of a row is read three times, and the residual written in the last."""
    row = lib.own_rows(ROWS)
    source = input + row[:, None] * row_stride
    target = result + row[:, None] * k
    old = None
    if residual is not None:
        old = residual + row[:, None] * k
    columns, inside, first = lib.first_block(row, m, k, BLOCK)
    # A constant, so it need not wait.
    w = lib.load_weights(weight, 0, columns, first, ROWS)
    if PDL:
        tl.extra.cuda.gdc_wait()
    x = _sum(source, old, columns, first)
    squares = x * x
    if LOOP:
        for start in range(BLOCK, k, BLOCK):
            more = _sum(source, old, start + columns, inside & (start + columns < k))
            squares += more * more
    bound = tl.load(scale_ub) if scale_ub is not None else None
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    rstd = lib.inverse_rms(squares, k, epsilon)
    y = _weighted(x, rstd, w)
    largest = tl.abs(y)
    if LOOP:
        for start in range(BLOCK, k, BLOCK):
            rest = inside & (start + columns < k)
            more = _sum(source, old, start + columns, rest)
            more = _weighted(more, rstd, lib.load_weights(weight, start, columns, rest, ROWS))
            largest = tl.maximum(largest, tl.abs(more))
    s = lib.store_scales(scale, row, m, largest, bound)
    lib.store_codes(target + columns, y, s, scale_ub, first)
    if residual is not None:
        tl.store(old + columns, x.to(residual.dtype.element_ty), mask=first)
    if LOOP:
        for start in range(BLOCK, k, BLOCK):
            rest = inside & (start + columns < k)
            x = _sum(source, old, start + columns, rest)
            y = _weighted(x, rstd, lib.load_weights(weight, start, columns, rest, ROWS))
            lib.store_codes(target + start + columns, y, s, scale_ub, rest)
            if residual is not None:
                tl.store(old + start + columns, x.to(residual.dtype.element_ty), mask=rest)


def launch(result, input, weight, scale, epsilon, scale_ub, residual, *, config, _launcher):
    """One program per `rows` rows. Of K at most `block` unless the config has `loop`."""
    m, k = input.size(0), input.size(1)
    tensors = (result, input, weight, scale, epsilon, scale_ub, residual)
    _launcher(
        rms_norm_dynamic_per_token_quant, lib.programs(m, config), *tensors, m, k, input.stride(0), **lib.options(config, k)
    )


def candidates(sizes: dict[str, int], _variant: Variant) -> list[dict[str, Any]]:
    """Configs worth measuring. `sizes` without K: for every K."""
    if "K" not in sizes:
        return lib.looped((4096, 8), (8192, 16), (4096, 4), (2048, 4), (8192, 8))
    return lib.whole(sizes["K"], lib.warps_for(sizes["K"]))
