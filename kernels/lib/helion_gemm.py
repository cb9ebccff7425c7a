"""The configs of the Helion kernels that multiply matrices: tiles of columns (weights), rows and, where it is free, k.

With many rows all of them come and go by TMA. With few they cannot: of a dimension that varies, Helion's descriptors are
valid from one power of two to the next only, up to 256, and buckets end with powers of two.
"""

from __future__ import annotations

from typing import Any

#: (columns, rows, k, num_warps, num_stages), by the most rows that they are for. Fewer columns than 64 are multiplied as
#: float16.
_FEW = {
    16: (
        (64, 16, 256, 4, 4), (64, 16, 128, 4, 6), (64, 16, 512, 4, 4), (64, 16, 256, 4, 6), (32, 16, 256, 4, 6),
        (32, 16, 512, 4, 4), (16, 16, 512, 4, 4), (128, 16, 128, 4, 6), (128, 16, 256, 4, 4), (32, 16, 1024, 8, 3),
    ),
    32: (
        (64, 32, 256, 4, 4), (64, 32, 128, 4, 6), (64, 32, 512, 4, 3), (32, 32, 256, 4, 5), (32, 32, 512, 4, 3),
        (16, 32, 512, 4, 3), (128, 32, 128, 4, 5), (128, 32, 256, 4, 4), (64, 16, 256, 4, 4),
    ),
    64: (
        (64, 64, 128, 4, 6), (64, 64, 256, 4, 3), (128, 64, 128, 4, 4), (128, 64, 128, 8, 4), (32, 64, 256, 4, 4),
        (64, 32, 256, 4, 4), (64, 64, 128, 4, 4), (128, 64, 256, 8, 3),
    ),
    256: (
        (64, 64, 128, 4, 6), (128, 64, 128, 4, 4), (64, 128, 128, 4, 4), (128, 128, 128, 4, 3), (128, 128, 128, 8, 4),
        (64, 128, 128, 8, 5), (128, 64, 128, 8, 6), (256, 64, 128, 8, 4),
    ),
}  # fmt: skip
_MANY = (
    (128, 128, 128, 8, 4), (128, 256, 128, 8, 3), (256, 128, 128, 8, 3), (128, 256, 128, 8, 4), (256, 128, 128, 8, 4),
    (64, 256, 128, 4, 4), (128, 128, 128, 4, 4), (128, 64, 128, 4, 6),
)  # fmt: skip

#: Bytes of shared memory that a block may have for its stages.
_SHARED = 220 * 1024


def candidates(rows: int, k: int | None = None, tma: str | list[str] = "tensor_descriptor") -> list[dict[str, Any]]:
    """Configs worth measuring.

    k    of a tile, for kernels that leave no choice; their first block size
    tma  Helion's `indexing` with many rows
    """
    most = next((most for most in _FEW if rows <= most), None)
    tiles = _MANY if most is None else _FEW[most]
    tiles = tuple(
        dict.fromkeys((c, r, k or depth, w, s) for c, r, depth, w, s in tiles if (c + r) * (k or depth) * s <= _SHARED)
    )
    found = [
        {"block_sizes": [depth, c, r] if k else [c, r, depth], "num_warps": warps, "num_stages": stages}
        for c, r, depth, warps, stages in tiles
    ]
    if most is not None:
        return [{**config, "indexing": "pointer", "pid_type": "flat"} for config in found]
    orders = ({"l2_groupings": [8], "pid_type": "flat"}, {"l2_groupings": [16], "pid_type": "persistent_interleaved"})
    return [{**config, "indexing": tma, "host_tensor_descriptors": True, **order} for config in found for order in orders]
