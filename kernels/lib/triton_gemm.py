"""The host side that the fp8 matrix products share: the configs of their four kernels, and their launches.

    dot     one or two rows of a, on the plain cores
    stream  few rows of a: the weights are the 64-row side of the tensor core
    tma     many rows of a, loaded by TMA
    pair    the same in Gluon: two groups of warps multiply at a time

A config's `block_k` is the K of a tile, where the op leaves a choice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from .hopper import SMS
from .triton_launch import launch_options

Config = dict[str, Any]


def dot(block_m: int, block_n: int, block_k: int, num_warps: int = 4, registers: int | None = None) -> Config:
    """A config of the dot kernel. block_m is 1 or 2; block_k is at least 512 * num_warps: 16 bytes per thread.

    A program holds block_n * block_k bytes of weights. `registers` is the most a thread may have, to fit more programs: best
    is one wave of them, so that all ask for their first weights while the kernel before this one runs.
    """
    config = {"kernel": "dot", "block_m": block_m, "block_n": block_n, "block_k": block_k, "num_warps": num_warps}
    return config if registers is None else {**config, "registers": registers}


def stream(
    block_m: int, block_n: int, num_stages: int, split: int = 1, prefetch: int = 1024, num_warps: int = 4, **more: int
) -> Config:
    """A config of the stream kernel. `prefetch` is in bytes per row of weights; a stage takes (block_n + split * block_m) *
    block_k bytes of shared memory.
    """
    tile = {"kernel": "stream", "block_m": block_m, "block_n": block_n, **more, "split": split}
    return {**tile, "group": 8, "prefetch": prefetch, "num_warps": num_warps, "num_stages": num_stages}


def tma(
    block_m: int, block_n: int, num_stages: int, programs: int = SMS, group: int = 8, prefetch: int = 0, num_warps: int = 4,
    **more: int,
) -> Config:  # fmt: skip
    """A config of the TMA kernel. An SM holds two blocks of 113 KB each or three of 75 KB."""
    tile = {"kernel": "tma", "block_m": block_m, "block_n": block_n, **more, "group": group}
    return {**tile, "programs": programs, "prefetch": prefetch, "num_warps": num_warps, "num_stages": num_stages}


def pair(block_m: int, block_n: int, num_stages: int, programs: int = SMS, group: int = 8, **more: int) -> Config:
    """A config of the Gluon kernel, one block per SM: at most 227 KB of shared memory, (block_m + block_n) * block_k bytes per
    stage and what out takes. num_warps is that of one of the two groups.
    """
    tile = {"kernel": "pair", "block_m": block_m, "block_n": block_n, **more, "group": group}
    return {**tile, "programs": programs, "prefetch": 0, "num_warps": 4, "num_stages": num_stages}


# fmt: off
#: By the M that they are for. With more rows of a the plain cores, not the memory, set the pace: `stream` is faster.
DOTS = {
    1: (
        dot(1, 8, 2048), dot(1, 4, 2048), dot(1, 2, 2048), dot(1, 2, 4096), dot(1, 4, 4096), dot(1, 4, 4096, num_warps=8),
        dot(1, 8, 1024, num_warps=2), dot(1, 8, 2048, registers=64), dot(1, 8, 4096, registers=128),
        dot(1, 4, 2048, registers=56), dot(1, 4, 2048, num_warps=2),
    ),
    2: (
        dot(2, 8, 2048), dot(2, 4, 2048), dot(2, 2, 2048), dot(2, 8, 1024, num_warps=2), dot(2, 4, 1024, num_warps=2),
        dot(2, 4, 2048, registers=64),
    ),
}
# fmt: on


class Call(NamedTuple):
    """The matrices of a call, their scales, and a bias, as the kernels take them: the op's tensors in order."""

    out: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor
    others: tuple[torch.Tensor | None, ...]
    strides: tuple[Any, ...]


def launch_plain(kernel: Any, call: Call, config: Mapping[str, Any], launcher: Callable[..., None], **constants: Any) -> None:
    """The dot or the stream kernel: of pointers."""
    out, a, b, others, strides = call
    m, k, n = a.size(0), a.size(1), b.size(1)
    rows = config["block_n"] // config.get("split", 1)
    tiles_m, tiles_n = (m + config["block_m"] - 1) // config["block_m"], (n + rows - 1) // rows
    grid = (tiles_n, tiles_m) if config["kernel"] == "dot" else (tiles_m * tiles_n,)
    sizes = (m, n, k, out.stride(0), a.stride(0), b.stride(1))
    launcher(kernel, grid, out, a, b, *others, *sizes, *strides, **_tile(config), **constants)


def launch_tiles(
    kernel: Any, call: Call, config: Mapping[str, Any], launcher: Callable[..., None], columns: int, out_columns: int,
    **constants: Any,
) -> None:  # fmt: skip
    """The TMA or the Gluon kernel: of descriptors; a program takes every num_programs-th tile of `columns` columns.

    A copy has all rows of a tile, in the Gluon kernel 64 of them; of out it has `out_columns` columns.
    """
    out, a, b, others, strides = call
    m, k, n = a.size(0), a.size(1), b.size(1)
    block_m, block_k, is_pair = config["block_m"], config.get("block_k", 128), config["kernel"] == "pair"
    rows = 64 if is_pair else block_m
    out_tiles = TensorDescriptor(out, [m, n], [out.stride(0), 1], [rows, out_columns])
    a_tiles = TensorDescriptor(a, [m, k], [a.stride(0), 1], [rows, block_k])
    b_tiles = TensorDescriptor(b, [n, k], [b.stride(1), 1], [config["block_n"], block_k])
    tiles = ((m + block_m - 1) // block_m) * ((n + columns - 1) // columns)
    grid, options = (torch.sym_min(tiles, config["programs"]),), _tile(config)
    # The TMA kernel prefetches weights, by their addresses.
    weights, row = ((), ()) if is_pair else ((b,), (b.stride(1),))
    launcher(kernel, grid, out_tiles, a_tiles, b_tiles, *weights, *others, m, n, k, *row, *strides, **options, **constants)


def _tile(config: Mapping[str, Any]) -> dict[str, Any]:
    """The constants that all of them have, and the launch options."""
    found = {"BLOCK_M": config["block_m"], "BLOCK_N": config["block_n"], **launch_options(config, config.get("num_stages"))}
    if "registers" in config:
        found["maxnreg"] = config["registers"]
    if config["kernel"] != "dot":
        found["GROUP"] = config["group"]
    if config["kernel"] in ("stream", "tma"):
        found["PREFETCH"] = config["prefetch"]
    return found
