"""What the Triton kernels of the ops with a scale per group share: device code, options, configs.

A tile is [groups, elements of a group] in float32. A row is a whole number of groups, so groups are numbered through all
rows, a program takes some neighbours, and rows matter only where the scales lie. Configs have

    elements   of a tile, a power of two and a multiple of the group size
    vector     8: a thread loads 16 bytes and stores 8; 16: it loads 32 bytes and stores 16, where a tile has so many
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from .triton_fp8 import absmax_scale, reciprocal
from .triton_launch import launch_options

#: Tiles of (elements, warps, vector) that suit rows of any length; the first is a safe default.
TILES = (
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


@triton.jit
def power_of_two(scale):
    """The least power of two of at least `scale`, for scale float32, normal and positive, or infinite."""
    bits = scale.to(tl.int32, bitcast=True)
    # A carry out of the mantissa unless it is 0.
    return ((bits + 0x007FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def eps_scale(x, eps, fp8_max, inverse, POWERS_OF_TWO: tl.constexpr):
    """max(max |group|, eps) / fp8_max of each group of a tile x, or the least power of two above; inverse: 1 / fp8_max."""
    scale = absmax_scale(tl.maximum(tl.max(tl.abs(x), 1), eps), fp8_max, inverse)
    if POWERS_OF_TWO:
        # What vLLM bounds a scale by before it rounds it up.
        scale = power_of_two(tl.maximum(scale, 1e-10))
    return scale


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
def clamped_codes(x, scale, fp8_min, fp8_max, POWERS_OF_TWO: tl.constexpr):
    """min(max(x * (1 / scale), fp8_min), fp8_max), and so fp8_min for NaN, for |x / scale| of at most fp8_max."""
    # A product, not a division, as in vLLM: it is rounded twice.
    quotient = tl.maximum(x * inverse_scale(scale, POWERS_OF_TWO)[:, None], fp8_min)
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


def whole_groups(columns: int, group_size: int) -> int:
    """The number of groups of a row; a row of `columns` elements that is no whole number of them is refused."""
    if columns % group_size:
        raise ValueError(f"a row has {columns} elements; the kernel takes multiples of the group size, {group_size}")
    return columns // group_size


def tile_options(config: dict[str, Any], group_size: int) -> dict[str, Any]:
    """The tile of a program, as the kernels' constants, and the launch options."""
    tile = config["elements"] // group_size
    return {"GROUP": group_size, "GROUPS": tile, "VECTOR": config["vector"], **launch_options(config)}


def launch_groups(
    kernel: Any, sizes: tuple[int, int, int], tensors: tuple[Any, ...], scales: torch.Tensor, config: dict[str, Any],
    launcher: Callable[..., None], **constants: Any,
) -> None:  # fmt: skip
    """A program for every `elements` elements of rows of whole groups.

    kernel  takes `tensors`, then groups, groups_of_row and the two strides of scales
    sizes   rows, columns, group_size
    """
    rows, columns, group_size = sizes
    groups_of_row = whole_groups(columns, group_size)
    groups, tile = rows * groups_of_row, config["elements"] // group_size
    strides = (scales.stride(0), scales.stride(1))
    options = tile_options(config, group_size)
    launcher(kernel, ((groups + tile - 1) // tile,), *tensors, groups, groups_of_row, *strides, **constants, **options)


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
