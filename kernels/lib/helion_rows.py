"""The configs of the Helion kernels that have a row per program: what they share."""

from __future__ import annotations

from typing import Any


def candidates(rows: int, columns: int) -> list[dict[str, Any]]:
    """Configs worth measuring: 4 to 64 elements of a row in each thread, and several rows where there are many."""
    blocks = (1, 2, 4) if rows >= 1024 else (1,)
    found = [(b, w) for b in blocks for w in (8, 4, 16, 2, 32) if 4 <= b * columns // (32 * w) <= 64]
    common = {"reduction_loops": [None], "num_stages": 1, "indexing": "pointer", "pid_type": "flat"}
    return [{"block_sizes": [b], "num_warps": w, **common} for b, w in found]
