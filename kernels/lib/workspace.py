"""The workspace of kernels that split a request's tokens: what is in it and its size. No GPU code: declarations need it too."""

from __future__ import annotations

#: Splits, of all pairs (request, kv head) together, that there is room for at least where MOST_ROWS allow it.
SPLITS = 2048
#: Rows, of all splits of all pairs, that there are sums for: at least, and at most.
ROWS, MOST_ROWS = 8192, 65536
#: Elements of a head at most.
LARGEST_HEAD = 256


def rows_held(rows: int) -> int:
    """Rows that there are sums for, of blocks of `rows` query rows, padded to a power of two: as many as SPLITS have."""
    return min(max(ROWS, SPLITS << (rows - 1).bit_length()), MOST_ROWS)


def cells(rows: int) -> int:
    """Splits, of all pairs together, that a workspace holds for blocks of `rows` query rows."""
    return rows_held(rows) // rows


def size(rows: int) -> int:
    """Bytes behind the counters, float32: of each row a maximum, a sum and a head of weighted sums of V."""
    return 4 * rows_held(rows) * (2 + LARGEST_HEAD)
