"""The Triton kernel of static_scaled_fp8_quant: a program takes a block of columns of one row."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from hdispatch.opspec import Variant

from ..lib.triton_blocks import block_configs, launch_blocks, own_block
from ..lib.triton_fp8 import fp8_times

GENERIC = ("K",)


@triton.jit
def static_scaled_fp8_quant(result, input, scale, k, blocks, row_stride, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """blocks: of one row."""
    row, columns = own_block(blocks, BLOCK)
    inside = columns < k
    if PDL:
        tl.extra.cuda.gdc_wait()
    x = tl.load(input + row.to(tl.int64) * row_stride + columns, mask=inside, other=0.0)
    inverse = tl.div_rn(1.0, tl.load(scale))
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    tl.store(result + row.to(tl.int64) * k + columns, fp8_times(x, inverse), mask=inside)


def launch(result, input, scale, _group_shape, *, config, _launcher):
    """One program per `block` columns of each row."""
    if scale.size(0) != 1:
        raise ValueError(f"static_scaled_fp8_quant: scale has {scale.size(0)} elements; the kernel takes one")
    m, k = input.size(0), input.size(1)
    launch_blocks(static_scaled_fp8_quant, m, k, (result, input, scale), (input.stride(0),), config, _launcher)


def candidates(sizes: dict[str, int], _variant: Variant) -> list[dict[str, Any]]:
    """Configs worth measuring, the same for every K."""
    few = [(1024, 4), (1024, 2), (512, 2), (512, 1), (2048, 4), (256, 1)]
    many = [(2048, 4), (1024, 2), (4096, 8), (4096, 4), (2048, 2), (8192, 8), (1024, 4)]
    return block_configs(few if sizes["M"] < 64 else many)
