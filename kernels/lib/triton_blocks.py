"""What the Triton kernels share whose programs take a block of columns of one row, so that a single row fills the GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import triton
import triton.language as tl

from .triton_launch import launch_options


@triton.jit
def own_block(blocks, BLOCK: tl.constexpr):
    """The program's row, a number, and its columns [BLOCK]; a row has so many blocks."""
    # Unsigned: a cheaper division.
    block = tl.program_id(0).to(tl.uint32)
    row = block // tl.cast(blocks, tl.uint32)
    columns = (block - row * tl.cast(blocks, tl.uint32)).to(tl.int32) * BLOCK + tl.arange(0, BLOCK)
    return row, columns


def launch_blocks(
    kernel: Any, rows: int, columns: int, tensors: tuple[Any, ...], strides: tuple[int, ...], config: dict[str, Any],
    launcher: Callable[..., None],
) -> None:  # fmt: skip
    """A program per `block` columns of each row; the kernel takes the tensors, columns, blocks of a row, and the strides."""
    blocks = (columns + config["block"] - 1) // config["block"]
    options = {"BLOCK": config["block"], **launch_options(config)}
    launcher(kernel, (rows * blocks,), *tensors, columns, blocks, *strides, **options)


def block_configs(tiles: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
    """Configs by (block, num_warps)."""
    return [{"block": block, "num_warps": warps} for block, warps in tiles]
