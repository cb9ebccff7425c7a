"""The workspace of kernels that split a request's tokens: what is in it and its size. No GPU code: declarations need it too."""

from __future__ import annotations

#: Pairs (request, kv head) that may have several splits at once: each has one of the workspace's counters.
PAIRS = 1024
#: Rows, of all splits of all pairs, that there are sums for.
ROWS = 8192
#: Elements of a head at most.
LARGEST_HEAD = 256
#: Behind the counters, in float32: of each row a maximum, a sum and a head of weighted sums of V.
BYTES = 4 * ROWS * (2 + LARGEST_HEAD)


def cells(rows: int) -> int:
    """Splits, of all pairs together, that a workspace holds for blocks of `rows` query rows."""
    return min(PAIRS, ROWS // rows)
