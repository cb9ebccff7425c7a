"""The Triton kernel of dynamic_scaled_fp8_quant, for small tensors: every program reads all of it, and writes its tiles.

Programs cannot exchange maxima in one launch without memory that somebody has zeroed, so each finds the maximum itself.
While the tensor is small, the level 2 cache makes that cheaper than the three launches that large tensors need.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from hdispatch.opspec import Variant

from ..lib.triton_fp8 import fp8_times, widened
from ..lib.triton_launch import launch_options

GENERIC = ("K",)

#: Elements beyond which three launches are faster: a program reads some 110 GB/s. 64 rows of 5120 are the most.
LIMIT = 64 * 5120


@triton.jit
def dynamic_scaled_fp8_quant(
    result, input, scale, m, k, row_stride, ROWS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    """Tiles of ROWS x BLOCK elements."""
    rows = tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    if PDL:
        tl.extra.cuda.gdc_wait()
    largest = tl.zeros([ROWS, BLOCK], tl.float32)
    for top in range(0, m, ROWS):
        source = input + (top + rows).to(tl.int64) * row_stride
        for left in range(0, k, BLOCK):
            x = tl.load(source + left + columns, mask=(top + rows < m) & (left + columns < k), other=0.0)
            largest = tl.maximum(largest, tl.abs(widened(x)))
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    # No lower bound, as in vLLM: of zeros the scale is 0, its reciprocal infinite, and 0 times that NaN.
    s = tl.div_rn(tl.max(tl.max(largest, axis=1), axis=0), 448.0)
    if tl.program_id(0) == 0:
        tl.store(scale, s)
    inverse = tl.div_rn(1.0, s)
    blocks = tl.cdiv(k, BLOCK)
    for tile in range(tl.program_id(0), tl.cdiv(m, ROWS) * blocks, tl.num_programs(0)):
        row = tile // blocks * ROWS + rows
        column = tile % blocks * BLOCK + columns
        inside = (row < m) & (column < k)
        x = tl.load(input + row.to(tl.int64) * row_stride + column, mask=inside, other=0.0)
        tl.store(result + row.to(tl.int64) * k + column, fp8_times(x, inverse), mask=inside)


def launch(result, input, scale, *, config, _launcher):
    """At most `programs` programs, for tensors of up to some LIMIT elements."""
    m, k = input.size(0), input.size(1)
    # Without the 8 the open bucket would not reach as far as a bucket must, not even for K = 16.
    if m * (k - 8) > LIMIT:
        raise ValueError(f"dynamic_scaled_fp8_quant: input has {m * k} elements; the kernel is for up to {LIMIT}")
    tiles = ((m + config["rows"] - 1) // config["rows"]) * ((k + config["block"] - 1) // config["block"])
    grid, tile = (torch.sym_min(tiles, config["programs"]),), {"ROWS": config["rows"], "BLOCK": config["block"]}
    _launcher(dynamic_scaled_fp8_quant, grid, result, input, scale, m, k, input.stride(0), **tile, **launch_options(config))


def candidates(sizes: dict[str, int], _variant: Variant) -> list[dict[str, Any]]:
    """Configs worth measuring, the same for every K."""
    most = sizes["M"]
    tiles = [(r, b, w) for r, b, w in ((1, 4096, 16), (1, 2048, 8), (2, 4096, 16), (4, 2048, 16), (8, 2048, 16)) if r <= most]
    tiles += [(8, 4096, 32), (16, 1024, 16), (16, 2048, 32)] if most >= 16 else []
    return [{"rows": r, "block": b, "programs": p, "num_warps": w} for r, b, w in tiles[-4:] for p in (16, 32)]
