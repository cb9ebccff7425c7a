"""The Triton kernel of rms_norm: rows are (token, head) pairs, a block of columns of each stays in registers."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from hdispatch.opspec import Variant

from ..lib import triton_rows as lib

GENERIC = ("K", "N")
EARLY_READS = ("weight",)


@triton.jit
def rms_norm(
    result, input, weight, epsilon, m, last_head, k, token_stride, head_stride,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, LOOP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Strides are in units of 8 elements, so that rows are seen to be 16-byte aligned. LOOP: k may exceed BLOCK."""
    # Unsigned: twice the rows before an overflow, and a cheaper division.
    row = tl.program_id(0).to(tl.uint32) * ROWS + tl.arange(0, ROWS).to(tl.uint32)
    heads = tl.cast(last_head + 1, tl.uint32)
    token = row // heads
    head = row - token * heads
    source = input + (token.to(tl.int64) * token_stride + head.to(tl.int64) * head_stride)[:, None] * 8
    target = result + row.to(tl.int64)[:, None] * k
    columns = tl.arange(0, BLOCK)[None, :]
    inside = (token < tl.cast(m, tl.uint32))[:, None]
    first = inside & (columns < k)
    # A constant, so it need not wait.
    w = lib.load_weights(weight, 0, columns, first, ROWS) if weight is not None else None
    if PDL:
        tl.extra.cuda.gdc_wait()
    x = tl.load(source + columns, mask=first, other=0.0).to(tl.float32)
    squares = x * x
    if LOOP:
        for start in range(BLOCK, k, BLOCK):
            more = tl.load(source + start + columns, mask=inside & (start + columns < k), other=0.0).to(tl.float32)
            squares += more * more
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    rstd = lib.inverse_rms(squares, k, epsilon)
    y = lib.normed(x, rstd, w)
    tl.store(target + columns, y.to(result.dtype.element_ty), mask=first)
    if LOOP:
        lib.store_rest(source, target, weight, rstd, k, columns, inside, ROWS, BLOCK)


def launch(result, input, weight, epsilon, *, config, _launcher):
    """One program per `rows` rows. Of K at most `block` unless the config has `loop`."""
    m, n, k = input.size(0), input.size(1), input.size(2)
    if input.stride(2) != 1 or input.stride(1) % 8 != 0 or input.stride(0) % 8 != 0:
        raise ValueError(f"rms_norm: strides {input.stride()} of input; the kernel takes rows that are 16-byte aligned")
    # n - 1, because n itself would be taken for a multiple of 16.
    sizes = (m, n - 1, k, input.stride(0) // 8, input.stride(1) // 8)
    _launcher(rms_norm, lib.programs(m * n, config), result, input, weight, epsilon, *sizes, **lib.options(config, k))


def candidates(sizes: dict[str, int], _variant: Variant) -> list[dict[str, Any]]:
    """Configs worth measuring. `sizes` without K: for every K."""
    k, many = sizes.get("K"), sizes["M"] >= 256
    if k is None:
        return lib.looped((4096, 8), (8192, 8), (4096, 4), (2048, 4), (8192, 16), (1024, 4)) + lib.looped((2048, 8), rows=2)
    block = triton.next_power_of_2(k)
    if block > 512:
        return lib.whole(k, lib.warps_for(k, (1, 2) if many else (1,)))
    # Vectors of 8 elements per thread and warps.
    vectors = [(1, 4), (1, 2), (1, 1), (1, 8), (2, 4), (2, 2), (4, 4), (4, 2), (4, 8)]
    return lib.whole(k, [(v * 256 * w // block, w) for v, w in vectors if (v == 1 or many) and v * 256 * w >= block])
