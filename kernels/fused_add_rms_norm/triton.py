"""The Triton kernel of fused_add_rms_norm: a block of columns of each row stays in registers."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from hdispatch.opspec import Variant

from ..lib import triton_rows as lib

GENERIC = ("K",)
EARLY_READS = ("weight",)


@triton.jit
def fused_add_rms_norm(
    input, residual, weight, epsilon, m, k, row_stride, residual_stride,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, LOOP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """LOOP: k may exceed BLOCK; then the rest of the residual is read again after the sum of squares is known."""
    row = lib.own_rows(ROWS)
    x_row = input + row[:, None] * row_stride
    r_row = residual + row[:, None] * residual_stride
    columns, inside, first = lib.first_block(row, m, k, BLOCK)
    # A constant, so it need not wait.
    w = lib.load_weights(weight, 0, columns, first, ROWS) if weight is not None else None
    if PDL:
        tl.extra.cuda.gdc_wait()
    x = tl.load(x_row + columns, mask=first, other=0.0).to(tl.float32)
    rounded = (x + tl.load(r_row + columns, mask=first, other=0.0).to(tl.float32)).to(residual.dtype.element_ty)
    tl.store(r_row + columns, rounded, mask=first)
    x = rounded.to(tl.float32)
    squares = x * x
    if LOOP:
        for start in range(BLOCK, k, BLOCK):
            rest = inside & (start + columns < k)
            more = tl.load(x_row + start + columns, mask=rest, other=0.0).to(tl.float32)
            more += tl.load(r_row + start + columns, mask=rest, other=0.0).to(tl.float32)
            rounded = more.to(residual.dtype.element_ty)
            tl.store(r_row + start + columns, rounded, mask=rest)
            more = rounded.to(tl.float32)
            squares += more * more
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    rstd = lib.inverse_rms(squares, k, epsilon)
    y = lib.normed(x, rstd, w)
    tl.store(x_row + columns, y.to(input.dtype.element_ty), mask=first)
    if LOOP:
        # The residual that is read here was written above, perhaps by another thread.
        tl.debug_barrier()
        lib.store_rest(r_row, x_row, weight, rstd, k, columns, inside, ROWS, BLOCK)


def launch(input, residual, weight, epsilon, *, config, _launcher):
    """One program per `rows` rows. Of K at most `block` unless the config has `loop`."""
    m, k = input.size(0), input.size(1)
    strides = (input.stride(0), residual.stride(0))
    _launcher(
        fused_add_rms_norm, lib.programs(m, config), input, residual, weight, epsilon, m, k, *strides, **lib.options(config, k)
    )


def candidates(sizes: dict[str, int], _variant: Variant) -> list[dict[str, Any]]:
    """Configs worth measuring. `sizes` without K: for every K."""
    if "K" not in sizes:
        return lib.looped((4096, 8), (8192, 8), (4096, 4), (8192, 16), (2048, 4), (1024, 4))
    return lib.whole(sizes["K"], lib.warps_for(sizes["K"], (1, 2) if sizes["M"] >= 256 else (1,)))
