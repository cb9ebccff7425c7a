"""The Triton kernel of per_token_group_fp8_quant, and what the kernels of the other ops with a scale per group share.

A tile is [groups, elements of a group] in float32. A row is a whole number of groups, so groups are numbered through all
rows, a program takes some neighbours, and rows matter only where the scales lie. Configs of this op and of the others have

    elements   of a tile, a power of two and a multiple of the group size
    vector     8: a thread loads 16 bytes and stores 8; 16: it loads 32 bytes and stores 16, where a tile has so many
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from hdispatch.opspec import Variant

from ..triton_device import reciprocal, widened

GENERIC = ("K",)
INDEX_BITS = 64


@triton.jit
def power_of_two(scale):
    """The least power of two of at least `scale`, for scale float32, normal and positive, or infinite."""
    bits = scale.to(tl.int32, bitcast=True)
    # A carry out of the mantissa unless it is 0.
    return ((bits + 0x007FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def absmax_scale(absmax, fp8_max, inverse):
    """absmax / fp8_max, rounded as IEEE's division, also of infinities; inverse is the reciprocal of fp8_max."""
    near = absmax * inverse
    exact = tl.fma(tl.fma(near, -fp8_max, absmax), inverse, near)
    return tl.where(absmax == float("inf"), absmax, exact)


@triton.jit
def inverse_scale(scale, POWERS_OF_TWO: tl.constexpr):
    """1 / scale of each group, rounded as IEEE's division, for scales up to 2**126 and 0 for infinite ones.

    With POWERS_OF_TWO they are such, from 2**-126 on.
    """
    if POWERS_OF_TWO:
        # The bits of an infinite scale would leave a negative number.
        bits = tl.maximum(0x7F000000 - scale.to(tl.int32, bitcast=True), 0)
        inverse = bits.to(tl.float32, bitcast=True)
    else:
        # A subnormal scale goes through the reciprocal as a normal number.
        lift = tl.where(scale < 1.1754943508222875e-38, 18446744073709551616.0, 1.0)
        inverse = tl.where(scale < float("inf"), reciprocal(scale * lift) * lift, 0.0)
    return inverse


@triton.jit
def divide_groups(x, scale, POWERS_OF_TWO: tl.constexpr):
    """min(x / scale, 448), rounded as IEEE's division, for a tile x and the scale of each group; see divide_rows.

    The scales are from 2**-126 to 2**126 or infinite.
    """
    inverse = inverse_scale(scale, POWERS_OF_TWO)[:, None]
    quotient = x * inverse
    if not POWERS_OF_TWO:
        divisor = tl.where(scale < float("inf"), scale, 0.0)[:, None]
        quotient = tl.fma(tl.fma(quotient, divisor, x * -1.0), inverse * -1.0, quotient)
    return tl.minimum(quotient, 448.0)


@triton.jit
def clamp_codes(quotient, fp8_min, fp8_max):
    """min(max(quotient, fp8_min), fp8_max), and so fp8_min for NaN; for quotients within a rounding of ±fp8_max."""
    quotient = tl.maximum(quotient, fp8_min)
    # The conversion to fp8 clamps at 448 by itself.
    if fp8_max != 448.0:
        quotient = tl.minimum(quotient, fp8_max)
    return quotient


@triton.jit
def store_codes(pointer, offset, quotient, inside, VECTOR: tl.constexpr):
    """Stores a tile in fp8, VECTOR bytes at a time: that much is said to be known of the addresses, and no more."""
    # The sum is made here, because a hint about an argument is lost.
    tl.store(tl.multiple_of(pointer + offset, (1, VECTOR)), quotient.to(tl.float8e4nv), inside)


@triton.jit
def row_of(group, groups_of_row):
    """The rows of groups that are numbered through all rows."""
    # Unsigned: a cheaper division.
    return (group.to(tl.uint32) // tl.cast(groups_of_row, tl.uint32)).to(tl.int32)


@triton.jit
def store_scales(pointer, scale, group, groups, groups_of_row, row_stride, group_stride):
    """Stores the scales of groups that are numbered through all rows; there are `groups` of them."""
    row = row_of(group, groups_of_row)
    place = row.to(tl.int64) * row_stride + (group - row * groups_of_row).to(tl.int64) * group_stride
    tl.store(pointer + place, scale, group < groups)


@triton.jit
def per_token_group_fp8_quant(
    input,
    output_q,
    output_s,
    eps,
    fp8_min,
    fp8_max,
    groups,
    groups_of_row,
    row_stride,
    group_stride,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    VECTOR: tl.constexpr,
    UE8M0: tl.constexpr,
    PDL: tl.constexpr,
):
    """GROUPS groups of GROUP elements per program."""
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    inside = (group < groups)[:, None]
    offset = group.to(tl.int64)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inverse = reciprocal(fp8_max)
    if PDL:
        tl.extra.cuda.gdc_wait()
    x = widened(tl.load(input + offset, inside, other=0.0))
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    scale = absmax_scale(tl.maximum(tl.max(tl.abs(x), 1), eps), fp8_max, inverse)
    if UE8M0:
        scale = power_of_two(tl.maximum(scale, 1e-10))
    # A product, not a division, as in vLLM: it is rounded twice.
    quotient = clamp_codes(x * inverse_scale(scale, UE8M0)[:, None], fp8_min, fp8_max)
    store_codes(output_q, offset, quotient, inside, VECTOR)
    # Last: the scales change hands between threads, which waits for all of them.
    store_scales(output_s, scale, group, groups, groups_of_row, row_stride, group_stride)


def launch(
    input: torch.Tensor,
    output_q: torch.Tensor,
    output_s: torch.Tensor,
    group_size: int,
    eps: float,
    fp8_min: float,
    fp8_max: float,
    scale_ue8m0: bool,
    dummy_is_scale_transposed: bool,  # noqa: ARG001
    dummy_is_tma_aligned: bool,  # noqa: ARG001
    *,
    config: dict[str, Any],
    _launcher: Callable[..., None],
) -> None:
    """One program for every `elements` elements."""
    m, groups_of_row = input.size(0), whole_groups(input.size(1), group_size)
    groups = m * groups_of_row
    tile = config["elements"] // group_size
    _launcher(
        per_token_group_fp8_quant,
        ((groups + tile - 1) // tile,),
        input,
        output_q,
        output_s,
        eps,
        fp8_min,
        fp8_max,
        groups,
        groups_of_row,
        output_s.stride(0),
        output_s.stride(1),
        GROUP=group_size,
        GROUPS=tile,
        VECTOR=config["vector"],
        UE8M0=scale_ue8m0,
        **launch_options(config),
    )


def whole_groups(columns: int, group_size: int) -> int:
    """The number of groups of a row; a row of `columns` elements that is no whole number of them is refused."""
    if columns % group_size:
        raise ValueError(f"a row has {columns} elements; the kernel takes multiples of the group size, {group_size}")
    return columns // group_size


def launch_options(config: dict[str, Any]) -> dict[str, Any]:
    """PDL and the options of the launch."""
    pdl = config.get("pdl", True)
    return {"PDL": pdl, "num_warps": config["num_warps"], "num_stages": 1, "launch_pdl": pdl}


def tile_configs(tiles: Sequence[tuple[int, int, int]], sizes: dict[str, int], columns: int) -> list[dict[str, Any]]:
    """Configs of tiles of (elements, warps, vector) for M rows of `columns` elements.

    The first one always. Of the others not those that would leave half of 132 SMs without a program where smaller ones would
    not, and not those that take more than 2**17 programs.
    """
    work = sizes["M"] * columns
    kept = [
        (elements, warps, vector)
        for elements, warps, vector in tiles
        if (elements <= 1024 or work >= 66 * elements) and work <= 2**17 * elements
    ]
    return [
        {"elements": elements, "vector": vector, "num_warps": warps}
        for elements, warps, vector in dict.fromkeys((tiles[0], *kept))
    ]


def candidates(sizes: dict[str, int], _variant: Variant) -> list[dict[str, Any]]:
    """Configs worth measuring for some sizes; the first is a safe default."""
    tiles = (
        (2048, 4, 16),
        (256, 1, 8),
        (512, 2, 8),
        (1024, 4, 8),
        (1024, 2, 16),
        (2048, 8, 8),
        (2048, 4, 8),
        (4096, 8, 16),
        (4096, 4, 16),
        (4096, 8, 8),
        (8192, 8, 16),
    )
    return tile_configs(tiles, sizes, sizes.get("K", 4096))
