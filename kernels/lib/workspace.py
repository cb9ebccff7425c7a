"""The workspace of kernels that split a request's tokens: what is in it and its size. No GPU code: declarations need it too."""

from __future__ import annotations

#: Pairs (request, kv head) that may have several splits at once, each with one of the workspace's counters; and splits in all.
PAIRS = 1024
#: Rows, of all splits of all pairs, that there are sums for: at least, and at most.
ROWS, MOST_ROWS = 8192, 32768
#: Elements of a head at most.
LARGEST_HEAD = 256


def rows_held(rows: int) -> int:
    """Rows that there are sums for, of blocks of `rows` query rows, padded to a power of two: as many as PAIRS splits have."""
    return min(max(ROWS, PAIRS << (rows - 1).bit_length()), MOST_ROWS)


def cells(rows: int) -> int:
    """Splits, of all pairs together, that a workspace holds for blocks of `rows` query rows."""
    return min(PAIRS, rows_held(rows) // rows)


def size(rows: int) -> int:
    """Bytes behind the counters, float32: of each row a maximum, a sum and a head of weighted sums of V."""
    return 4 * rows_held(rows) * (2 + LARGEST_HEAD)
