"""Configs of the tile form of the CuteDSL GEMMs that are worth measuring: see tile_gemm.py. No DSL."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: Bytes that a stage and what is not stages may take of shared memory.
_STAGES = 208 * 1024

#: Fewer tokens than this are not worth a tile.
LEAST_M = 64


def tile(tile_m: int, tile_n: int, cluster: int = 1, shared: str = "w", band: int = 8, stages: int = 0) -> dict[str, Any]:
    """A config of `TileGemm`, with as many stages as there is room for where none are given."""
    stages = stages or min(_STAGES // (128 * (tile_m + tile_n)), 8)
    form = {"kernel": "tile", "tile_m": tile_m, "tile_n": tile_n, "stages": stages}
    return form | {"cluster": cluster, "shared": shared, "band": band}


def block_tile(
    tile_m: int, tile_n: int, cluster: int = 1, shared: str = "w", band: int = 8, at_once: int = 128, stages: int = 0
) -> dict[str, Any]:
    """A config of `BlockTileGemm`."""
    return tile(tile_m, tile_n, cluster, shared, band, stages) | {"kernel": "block_tile", "at_once": at_once}


def _tiles(m: int, n: int) -> list[dict[str, Any]]:
    """Tile, cluster, what it shares and band, for about m tokens: no taller than they are, clusters of tiles that exist."""
    if m <= 128:
        found = [(64, 128, 1, "w", 8), (64, 128, 2, "x", 8), (64, 256, 1, "w", 8), (64, 256, 2, "x", 8)]
        found += [(128, 64, 2, "x", 8), (128, 128, 2, "x", 8)] if m > 64 else []
    elif m <= 256:
        found = [(64, 128, 2, "x", 8), (128, 64, 2, "w", 8), (128, 128, 1, "w", 8), (128, 128, 2, "w", 8)]
        found += [(128, 128, 2, "x", 8), (256, 64, 2, "x", 8)]
    else:
        found = [(128, 128, 2, "w", 8), (128, 128, 2, "x", 8), (256, 128, 2, "w", 8), (256, 128, 2, "x", 8)]
        # With many tokens what the L2 holds of them decides.
        found += [(256, 128, 2, "w", 32), (128, 256, 2, "w", 8)] if m > 1024 else [(128, 256, 2, "x", 8), (256, 128, 1, "w", 8)]
    names = ("tile_m", "tile_n", "cluster", "shared", "band")
    return [dict(zip(names, each, strict=True)) for each in found if each[1] * (2 if each[3] == "x" else 1) <= max(n, 128)]


def tile_candidates(sizes: Mapping[str, int]) -> list[dict[str, Any]]:
    """Configs of `TileGemm` for sizes, of any N where they have none; none for few tokens."""
    m = sizes["M"]
    return [tile(**each) for each in _tiles(m, sizes.get("N", 6144))] if m >= LEAST_M else []


def block_tile_candidates(sizes: Mapping[str, int]) -> list[dict[str, Any]]:
    """The same of `BlockTileGemm`; of the tallest also those whose sums are made in halves, two of them in turn."""
    m = sizes["M"]
    if m < LEAST_M:
        return []
    found = [block_tile(**each) for each in _tiles(m, sizes.get("N", 6144))]
    if m > 256:
        found += [block_tile(128, 128, 2, at_once=64), block_tile(256, 128, 2, at_once=64)]
    return found
