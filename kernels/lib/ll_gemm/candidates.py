"""Configs of the low-latency GEMMs that are worth measuring: for fp8 weights, and for those that no L2 holds. No DSL."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..hopper import SMS
from .configs import WIDE, block_scaled, columns_for, dot, pieces_of, split, warpgroup

#: The most rows of a scaled_mm op for which these compete; with more the tile form's are alone.
FEW_ROWS = 192

#: More 16-byte vectors than this per thread do not fit registers.
_VECTORS = 24


def fp8_candidates(sizes: Mapping[str, int]) -> list[dict[str, Any]]:
    """Configs that are worth measuring, the first of them for any K and N. `sizes` without K or N: for every one."""
    m, k, columns = sizes["M"], sizes["K"], columns_for(sizes["M"])
    found = _warpgroups(k, sizes.get("N"), columns)
    if columns <= 2:
        found += [split(4, 1, 2, rows=2, columns=columns, depth=2), split(8, 1, 2, rows=2, columns=columns, depth=2)]
        # All weights on their way at once: for matrices of about as much as the GPU's blocks hold.
        for warps, rows in ((16, 2), (8, 2), (16, 1)):
            steps, left = divmod(k, 64 * warps)
            if not left and steps >= 2 and rows * steps <= 16:
                found.append(split(warps, 1, steps, rows=rows, columns=columns))
    if m <= 2:
        for warps in (8, 4):
            turns, left = divmod(k, 16 * 32 * warps)
            if not left:
                found += [
                    dot(warps, outputs, m, trigger) for outputs in (4, 2) for trigger in (0, 2) if turns * outputs <= _VECTORS
                ]
    return found


#: Kilobytes of shared memory: of a block alone on its SM, and of one beside the next kernel's.
_ALONE, _BESIDE = 220, 108

#: Chunks in a stage, shared memory, sets of warps that multiply.
_RINGS = ((2, _ALONE, 1), (2, _ALONE, 2), (4, _ALONE, 2), (2, _BESIDE, 1))

#: Tiles are worth trying that use this share of the blocks' time.
_BUSY = 0.93


def _tiles(n: int | None, every: bool = False) -> list[tuple[int, int]]:
    """Rows of a tile and blocks that share it, which keep a GPU's SMs about equally busy. Any N: a tile per SM.

    `every`: all such above 64 rows too, not the least alone.
    """
    if n is None:
        return [(64, 1), (64, 2), (32, 1)]
    found = []
    for cluster in (1, 2, 4):
        slots = SMS // cluster
        counts = {rows: -(-n // rows) for rows in range(16, 129, 8)}
        busy = [rows for rows, tiles in counts.items() if tiles >= _BUSY * slots * -(-tiles // slots)]
        if every and cluster == 4:
            busy = [rows for rows in busy if counts[rows] <= slots][-1:]
        wide = [rows for rows in busy if rows > 64][: None if every else 1]
        if cluster < 4 or all(counts[rows] <= slots for rows in busy):
            found += [(rows, cluster) for rows in [*[rows for rows in busy if rows <= 64][-2:], *wide]]
    return found or [(64, 1), (64, 2)]


def _warpgroups(k: int, n: int | None, columns: int) -> list[dict[str, Any]]:
    """With as many stages as there is shared memory, beside the sums that the blocks of a cluster give each other."""
    if columns > WIDE:
        return _wide_warpgroups(k, n, columns)
    found = []
    for rows, cluster in _tiles(n):
        for steps, most, ways in _RINGS:
            if stages := _stages(k, rows, columns, cluster, steps, most, ways):
                found.append(warpgroup(rows, columns, steps, stages, cluster, ways=ways))
        if n is None or n > SMS * rows // cluster:
            found += _resident(k, rows, columns, cluster)
    return found


def _stages(k: int, rows: int, columns: int, cluster: int, steps: int, most: int, ways: int) -> int:
    """Stages that fit `most` kilobytes, with rows of k bytes; 0 where there are too few."""
    pool = 4096 * -(-rows // 64) * columns * (ways - 1)
    stage = 128 * (rows + 8 * columns) * steps
    turns = -(-k // (128 * steps * cluster))
    stages = min((most * 1024 - _others(rows, columns, cluster) - pool) // stage, turns) // ways * ways
    return stages if stages > ways and turns % ways == 0 else 0


def _resident(k: int, rows: int, columns: int, cluster: int) -> list[dict[str, Any]]:
    """A config whose tokens stay, where that leaves room for a ring."""
    stages = (_ALONE * 1024 - _others(rows, columns, cluster) - 8 * columns * k // cluster) // (128 * rows * 2)
    return [warpgroup(rows, columns, 2, stages, cluster, resident=1)] if stages >= 4 else []


def _others(rows: int, columns: int, cluster: int) -> int:
    """Bytes of scales, of the sums that the blocks of a cluster give each other, and of barriers."""
    return 512 * -(-rows // 64) * (2 + 2 * columns + 8 * columns * (cluster - 1) // cluster) + 2048


#: Bytes of weights of which the most part is in no L2.
STREAMED = 2**27

# fmt: off
#: Rows of a tile, blocks on an SM, chunks in a stage, sets of warps that multiply.
_STREAMS = (
    (64, 1, 2, 1), (64, 1, 4, 1), (64, 1, 2, 2), (48, 1, 2, 2), (64, 2, 2, 1), (128, 1, 2, 1), (128, 1, 1, 1), (96, 1, 2, 1),
)
# fmt: on


def streaming_candidates(k: int, columns: int) -> list[dict[str, Any]]:
    """For weights in rows of k bytes that stream from memory: tiles are many, so all SMs are busy to the end with any.

    The first one is never far behind.
    """
    found = []
    for rows, blocks, steps, ways in _STREAMS:
        if stages := _stages(k, rows, columns, 1, steps, _ALONE if blocks == 1 else _BESIDE, ways):
            found.append(warpgroup(rows, columns, steps, stages, blocks=SMS * blocks, ways=ways))
    return found + [config for rows in (64, 128) for config in _resident(k, rows, columns, 1)]


def _wide_warpgroups(k: int, n: int | None, columns: int) -> list[dict[str, Any]]:
    """Wide tiles of 32 rows or more: smaller ones bring more tokens than weights, and an SM takes in 64 bytes a cycle."""
    found = []
    for rows, cluster in _tiles(n, every=True):
        given = 8 * columns // pieces_of(columns) * (cluster - 1) // cluster
        others = 512 * -(-rows // 64) * (2 + given) + 32 * columns + 2048
        for steps in (1, 2):
            turns = -(-k // (128 * steps * cluster))
            stages = min((_ALONE * 1024 - others) // (128 * (rows + 8 * columns) * steps), turns)
            if rows >= 32 and stages > steps:
                found.append(warpgroup(rows, columns, steps, stages, cluster))
    return found


def block_scaled_candidates(sizes: Mapping[str, int]) -> list[dict[str, Any]]:
    """Configs of the block-scaled form that are worth measuring: a handful, for every M that a config takes."""
    k, n, columns = sizes["K"], sizes.get("N"), columns_for(sizes["M"])
    # With many tokens a turn of one chunk, whose tokens are halved, leaves room for more stages.
    rings = ((2, _ALONE, 1), (2, _ALONE, 2), (2, _BESIDE, 1)) if columns <= 4 else ((1, _ALONE, 1), (2, _ALONE, 1))
    # Of each cluster the tallest tile of four warps, and the shortest of eight. Small tiles bring more tokens than weights.
    tiles: dict[tuple[int, bool], int] = {}
    for rows, cluster in _tiles(n, every=columns > 4):
        if rows <= 64:
            tiles[cluster, False] = rows
        elif columns <= WIDE:
            tiles.setdefault((cluster, True), rows)
    found = []
    for (cluster, _), rows in tiles.items():
        if rows < min(4 * columns, 32):
            continue
        groups = -(-rows // 64)
        others = 512 * groups * 8 * columns * (cluster - 1) // cluster + 2048
        for steps, most, ways in rings:
            pool = 4096 * groups * columns * (ways - 1)
            stage = (128 * (rows + 8 * columns) + 4 * (8 * columns + 20)) * steps
            turns = -(-k // (128 * steps * cluster))
            stages = min((most * 1024 - others - pool) // stage, turns) // ways * ways
            fitting = stages > ways and turns % ways == 0
            config = block_scaled(rows, columns, steps, stages, cluster, ways=ways)
            if fitting and (groups == 1 or ways == 1) and (cluster == 1 or most == _ALONE) and config not in found:
                found.append(config)
    return found
