"""What the host functions of Triton kernels that take whole rows share: blocks of rows, options, configs. No GPU code.

A config has `rows` and `block`, the tile of a program in rows and columns; `loop`, whether rows may be longer than `block`;
and `num_warps`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import triton

Config = dict[str, Any]


def programs(rows: int, config: Config) -> tuple[int]:
    """The grid: a program per `rows` rows."""
    return ((rows + config["rows"] - 1) // config["rows"],)


def options(config: Config, columns: int) -> dict[str, Any]:
    """The constants and launch options of a kernel. ValueError for rows of more columns than the config takes."""
    if not config["loop"] and columns > config["block"]:
        raise ValueError(f"rows of {columns} elements do not fit the config's block of {config['block']}")
    pdl = config.get("pdl", True)
    return {
        "ROWS": config["rows"],
        "BLOCK": config["block"],
        "LOOP": config["loop"],
        "PDL": pdl,
        "num_warps": config["num_warps"],
        "num_stages": 1,
        "launch_pdl": pdl,
    }


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
