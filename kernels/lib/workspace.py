"""The workspace of kernels that split a request's tokens: counters, then sums. No GPU code: declarations need its size too.

Counters come first, in every op's: they are zero between launches, and the rest is written before it is read.
"""

from __future__ import annotations

#: Counters: pairs (request, kv head) that may have several splits at once.
COUNTERS = 1024
#: Rows, of all splits of all pairs, that there are sums for.
ROWS = 8192
#: Elements of a head at most.
LARGEST_HEAD = 256
#: All of it in float32: of each row a maximum, a sum and a head of weighted sums of V.
BYTES = 4 * (COUNTERS + ROWS * (2 + LARGEST_HEAD))


def cells(rows: int) -> int:
    """Splits, of all pairs together, that a workspace holds for blocks of `rows` query rows."""
    return min(COUNTERS, ROWS // rows)
