"""The Triton kernel of silu_and_mul_per_block_quant: some neighbouring groups per program.

Groups are numbered through all rows. See lib/triton_groups.py.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from hdispatch.opspec import Variant

from ..lib import triton_groups as lib
from ..lib.triton_fp8 import MIN_SCALE, absmax_scale, clamp_rows, silu, widened
from ..lib.triton_groups import divide_groups, power_of_two, row_of, store_codes, store_scales

GENERIC = ("N",)


@triton.jit
def silu_and_mul_per_block_quant(
    out, input, scales, scale_ub, groups, groups_of_row, row_stride, group_stride,
    GROUP: tl.constexpr, GROUPS: tl.constexpr, VECTOR: tl.constexpr, UE8M0: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """GROUPS groups of GROUP elements per program."""
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    inside = (group < groups)[:, None]
    column = tl.arange(0, GROUP)[None, :]
    # A row of the input is twice as long: its first half lies where that many groups more come before it.
    half = tl.cast(groups_of_row, tl.int64)
    gate_at = (group + row_of(group, groups_of_row) * half)[:, None] * GROUP + column
    if PDL:
        tl.extra.cuda.gdc_wait()
    gate = widened(tl.load(input + gate_at, inside, other=0.0))
    up = widened(tl.load(input + half * GROUP + gate_at, inside, other=0.0))
    if scale_ub is not None:
        bound = tl.load(scale_ub)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    x = silu(gate) * up
    scale = absmax_scale(tl.max(tl.abs(x), 1), 448.0, 1.0 / 448.0)
    if scale_ub is not None:
        scale = tl.minimum(scale, bound)  # the bound of a scale that is NaN, which a group of NaNs has
    scale = tl.maximum(scale, MIN_SCALE)
    if UE8M0:
        scale = power_of_two(scale)
    if scale_ub is not None:
        x = clamp_rows(x, scale)
    quotient = divide_groups(x, scale, UE8M0)
    offset = group.to(tl.int64)[:, None] * GROUP + column
    store_codes(out, offset, quotient, inside, VECTOR)
    # Last: the scales change hands between threads, which waits for all of them.
    store_scales(scales, scale, group, groups, groups_of_row, row_stride, group_stride)


def launch(out, input, scales, group_size, scale_ub, _is_scale_transposed, scale_ue8m0, *, config, _launcher):
    """One program for every `elements` elements."""
    sizes, tensors = (out.size(0), out.size(1), group_size), (out, input, scales, scale_ub)
    lib.launch_groups(silu_and_mul_per_block_quant, sizes, tensors, scales, config, _launcher, UE8M0=scale_ue8m0)


def candidates(sizes: dict[str, int], _variant: Variant) -> list[dict[str, Any]]:
    """Configs worth measuring for some sizes; the first is a safe default."""
    tiles = [tile for tile in lib.TILES if tile not in ((2048, 4, 8), (8192, 8, 16))]
    return lib.tile_configs(tiles, sizes, sizes.get("N", 6144))
