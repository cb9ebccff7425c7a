"""The configs of the low-latency GEMMs' forms: see program.py. No DSL."""

from __future__ import annotations

from typing import Any

from ..hopper import SMS

#: Columns of tokens in a tile of the tensor core.
COLUMNS = 8

#: More columns than this are a wide tile of `Warpgroup`, whose tokens come in pieces of at most PIECE.
WIDE, PIECE = 16, 80

#: Columns that configs have, the least first.
_COLUMNS = (1, 2, 4, 8, 16, 18, 20, 24)


def split(
    warps: int, cluster: int, steps: int, rows: int = 1, columns: int = 1, depth: int = 0, trigger: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """A config of `Split`; without a depth the weights go straight to registers."""
    form = {"kernel": "split", "rows": rows, "columns": columns, "warps": warps, "cluster": cluster, "steps": steps}
    return form | {"depth": depth or 1, "direct": int(not depth), "trigger": trigger}


def dot(warps: int, outputs: int = 1, tokens: int = 1, trigger: int = 0) -> dict[str, Any]:
    """A config of `Dot`."""
    return {"kernel": "dot", "outputs": outputs, "tokens": tokens, "warps": warps, "trigger": trigger}


def warpgroup(
    rows: int, columns: int, steps: int, stages: int, cluster: int = 1, blocks: int = SMS, resident: int = 0, ways: int = 1,
    trigger: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """A config of `Warpgroup`. Its shared memory: 128 bytes * (rows + 8 * columns) * steps * stages, at most 226 KB."""
    form = {"kernel": "warpgroup", "rows": rows, "columns": columns, "steps": steps, "stages": stages}
    return form | {"cluster": cluster, "blocks": blocks, "resident": resident, "ways": ways, "trigger": trigger}


def block_scaled(
    rows: int, columns: int, steps: int, stages: int, cluster: int = 1, blocks: int = SMS, resident: int = 0, ways: int = 1,
    trigger: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """A config of `BlockScaled`. Its shared memory: of `Warpgroup`, and 4 bytes * (8 * columns + 1 to 16) * steps * stages."""
    return warpgroup(rows, columns, steps, stages, cluster, blocks, resident, ways, trigger) | {"kernel": "block_scaled"}


def columns_for(m: int) -> int:
    """The columns of a config that takes m tokens."""
    return next(columns for columns in _COLUMNS if m <= columns * COLUMNS)


def pieces_of(columns: int) -> int:
    """How many pieces the tokens of a wide tile come in, and how many parts its sums are exchanged in."""
    return -(-columns * COLUMNS // PIECE)
