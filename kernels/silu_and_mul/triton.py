"""The Triton kernel of silu_and_mul: a program takes a block of columns of one row, so that a single row fills the GPU."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from hdispatch.opspec import Variant

from ..lib.triton_blocks import block_configs, launch_blocks, own_block
from ..lib.triton_fp8 import divided_silu, widened

GENERIC = ("N",)


@triton.jit
def silu_and_mul(result, input, n, blocks, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """blocks: of one row."""
    row, columns = own_block(blocks, BLOCK)
    inside = columns < n
    gates = input + row.to(tl.int64) * n * 2
    if PDL:
        tl.extra.cuda.gdc_wait()
    gate = tl.load(gates + columns, mask=inside, other=0.0)
    up = tl.load(gates + n + columns, mask=inside, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    activated = divided_silu(widened(gate)).to(gate.dtype)
    # 16-bit numbers: a product in float32 that is rounded is the same, and more instructions.
    tl.store(result + row.to(tl.int64) * n + columns, activated * (up + 0.0), mask=inside)


def launch(result, input, *, config, _launcher):
    """One program per `block` columns of each row."""
    m, n = result.size(0), result.size(1)
    launch_blocks(silu_and_mul, m, n, (result, input), (), config, _launcher)


def candidates(sizes: dict[str, int], _variant: Variant) -> list[dict[str, Any]]:
    """Configs worth measuring, the same for every N."""
    few = [(1024, 4), (512, 2), (256, 1), (1024, 2), (2048, 8), (512, 1)]
    many = [(1024, 4), (2048, 4), (4096, 8), (4096, 4), (2048, 8), (1024, 2), (2048, 2), (8192, 8)]
    return block_configs(few if sizes["M"] < 64 else many)
