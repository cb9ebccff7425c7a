"""The configs of the Helion kernels that have a row per program: what they share."""

from __future__ import annotations

from typing import Any


def candidates(rows: int, columns: int) -> list[dict[str, Any]]:
    """Configs worth measuring: 4 to 64 elements of a row in each thread, and several rows where there are many."""
    blocks = (1, 2, 4) if rows >= 1024 else (1,)
    found = [(b, w) for b in blocks for w in (8, 4, 16, 2, 32) if 4 <= b * columns // (32 * w) <= 64]
    common = {"reduction_loops": [None], "num_stages": 1, "indexing": "pointer", "pid_type": "flat"}
    return [{"block_sizes": [b], "num_warps": w, **common} for b, w in found]


def head_candidates(tokens: int, heads: int, columns: int) -> list[dict[str, Any]]:
    """Configs of tiles of tokens and heads: those of `candidates` for long rows; of short ones some in a program."""
    if columns > 512:
        return [{**config, "block_sizes": [*config["block_sizes"], 1]} for config in candidates(tokens, columns)]
    tiles = [(t, h, w) for t in ((1, 4) if tokens >= 256 else (1,)) for h in (1, 2, 4, 8, 16) for w in (1, 2, 4, 8)]
    kept = [(t, h, w) for t, h, w in tiles if h < 2 * heads and (4 <= t * h * columns // (32 * w) <= 32)]
    common = {"reduction_loops": [None], "num_stages": 1, "indexing": "pointer", "pid_type": "flat"}
    return [{"block_sizes": [t, h], "num_warps": w, **common} for t, h, w in kept]


def block_candidates(rows: int, columns: int) -> list[dict[str, Any]]:
    """Configs of a block of columns of one row: 8 to 32 elements in each thread."""
    few = [(1024, 4), (512, 2), (256, 1), (1024, 2), (2048, 8), (2048, 4), (512, 1)]
    many = [(1024, 4), (2048, 4), (4096, 8), (4096, 4), (2048, 8), (1024, 2), (2048, 2), (8192, 8)]
    common = {"num_stages": 1, "indexing": "pointer", "pid_type": "flat"}
    tiles = few if rows < 64 else many
    return [{"block_sizes": [1, block], "num_warps": warps, **common} for block, warps in tiles if block < 2 * columns]
