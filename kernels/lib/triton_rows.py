"""What the Triton kernels that take whole rows share: device code, and their host functions' grids, options and configs.

A program takes some rows. Of each it has the first block of columns in registers; where rows may be longer, it reads the
rest again for every pass. A config has `rows` and `block`, the tile of a program in rows and columns; `loop`, whether rows
may be longer than `block`; and `num_warps`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from .triton_fp8 import bounded, clamp_rows, divide_rows, row_scale
from .triton_launch import launch_options

Config = dict[str, Any]


@triton.jit
def own_rows(ROWS: tl.constexpr):
    """The program's rows, int64 [ROWS]."""
    return tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS).to(tl.int64)


@triton.jit
def first_block(row, m, n, BLOCK: tl.constexpr):
    """The first columns [1, BLOCK]; which rows are below m, [rows, 1], and which of their elements are below n too."""
    columns = tl.arange(0, BLOCK)[None, :]
    inside = (row < m)[:, None]
    return columns, inside, inside & (columns < n)


@triton.jit
def store_scales(scale, row, m, largest, bound):
    """Stores the scale of each row, of its greatest magnitudes, at most `bound` unless that is None; returns the scales."""
    absmax = tl.max(largest, axis=1)
    if bound is not None:
        absmax = bounded(absmax, bound)
    s = row_scale(absmax)
    tl.store(scale + row, s, mask=row < m)
    return s


@triton.jit
def store_codes(target, x, scale, scale_ub, mask):
    """Stores x / scale of each row in fp8. scale_ub, if it is given, may have lowered the scale: then x is clamped first."""
    if scale_ub is not None:
        x = clamp_rows(x, scale)
    tl.store(target, divide_rows(x, scale).to(tl.float8e4nv), mask=mask)


@triton.jit
def quantize_rows(
    load: tl.constexpr, result, input, scale, scale_ub, m, n, row_stride,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, LOOP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The kernel that writes rows [m, n] of `load` in fp8, each with the scale of its maximum.

    load(source, start, columns, n, mask) gives what is quantized of rows, float32, at `start + columns`. LOOP: n may exceed
    BLOCK; then the rest of a row is loaded twice.
    """
    row = own_rows(ROWS)
    source = input + row[:, None] * row_stride
    target = result + row[:, None] * n
    columns, inside, first = first_block(row, m, n, BLOCK)
    if PDL:
        tl.extra.cuda.gdc_wait()
    x = load(source, 0, columns, n, first)
    largest = tl.abs(x)
    if LOOP:
        for start in range(BLOCK, n, BLOCK):
            more = load(source, start, columns, n, inside & (start + columns < n))
            largest = tl.maximum(largest, tl.abs(more))
    bound = tl.load(scale_ub) if scale_ub is not None else None
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    s = store_scales(scale, row, m, largest, bound)
    store_codes(target + columns, x, s, scale_ub, first)
    if LOOP:
        for start in range(BLOCK, n, BLOCK):
            rest = inside & (start + columns < n)
            x = load(source, start, columns, n, rest)
            store_codes(target + start + columns, x, s, scale_ub, rest)


@triton.jit
def load_weights(weight, start, columns, mask, ROWS: tl.constexpr):
    """Weights at `start + columns` as a matrix of ROWS rows, which gets the input's layout in registers.

    Not of None: a function of Triton 3.6 returns no None.
    """
    place = weight + start + columns + tl.zeros([ROWS, 1], tl.int32)
    return tl.load(place, mask=mask, other=0.0)


@triton.jit
def inverse_rms(squares, n, epsilon):
    """1 / sqrt(mean + epsilon) of each row of n elements, from squares that add up to the row's: [rows, 1]."""
    return tl.rsqrt(tl.sum(squares, axis=1) / n + epsilon)[:, None]


@triton.jit
def normed(x, rstd, w):
    """x * rstd * w in float32, w being weights of any dtype or None."""
    y = x * rstd
    if w is not None:
        y *= w.to(tl.float32)
    return y


@triton.jit
def store_rest(source, target, weight, rstd, k, columns, inside, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Stores the norm of what lies behind the first block of rows, which is read again."""
    for start in range(BLOCK, k, BLOCK):
        rest = inside & (start + columns < k)
        more = tl.load(source + start + columns, mask=rest, other=0.0).to(tl.float32)
        w = load_weights(weight, start, columns, rest, ROWS) if weight is not None else None
        y = normed(more, rstd, w)
        tl.store(target + start + columns, y.to(target.dtype.element_ty), mask=rest)


def programs(rows: int, config: Config) -> tuple[int]:
    """The grid: a program per `rows` rows."""
    return ((rows + config["rows"] - 1) // config["rows"],)


def options(config: Config, columns: int) -> dict[str, Any]:
    """The constants and launch options of a kernel. ValueError for rows of more columns than the config takes."""
    if not config["loop"] and columns > config["block"]:
        raise ValueError(f"rows of {columns} elements do not fit the config's block of {config['block']}")
    return {"ROWS": config["rows"], "BLOCK": config["block"], "LOOP": config["loop"], **launch_options(config)}


def quantize(
    kernel: Any, result: torch.Tensor, input: torch.Tensor, scale: torch.Tensor, scale_ub: torch.Tensor | None,
    config: Config, launcher: Callable[..., None],
) -> None:  # fmt: skip
    """Launches a kernel with the parameters of `quantize_rows`. Of rows at most `block` unless the config has `loop`."""
    m, n = result.size(0), result.size(1)
    grid = programs(m, config)
    launcher(kernel, grid, result, input, scale, scale_ub, m, n, input.stride(0), **options(config, n))


def looped(*tiles: tuple[int, int], rows: int = 1) -> list[Config]:
    """Configs for rows of any length, by (block, num_warps)."""
    return [{"rows": rows, "block": block, "loop": True, "num_warps": warps} for block, warps in tiles]


def whole(columns: int, tiles: Iterable[tuple[int, int]]) -> list[Config]:
    """Configs for rows that fit one block, by (rows, num_warps)."""
    block = triton.next_power_of_2(columns)
    return [{"rows": rows, "block": block, "loop": False, "num_warps": warps} for rows, warps in tiles]


def warps_for(columns: int, rows: Sequence[int] = (1,), most_elements: int = 1024) -> list[tuple[int, int]]:
    """Tiles (rows, num_warps) in which a thread has one to four vectors of 8 elements of a row, or the smallest tile.

    With more than `most_elements` of a tile per warp registers run out.
    """
    block = triton.next_power_of_2(columns)
    most = block // 256  # one vector per thread
    tiles = [(r, w) for r in rows for w in (most // 2, most // 4, most)]
    return [(r, w) for r, w in tiles if r <= w <= 32 and r * block <= most_elements * w] or [(1, 1)]
