"""The workspace of kernels that split a request's tokens: counters, then sums. No GPU code: declarations need its size too."""

from __future__ import annotations

#: Counters at the head of every workspace: pairs (request, kv head) that may have several splits at once.
COUNTERS = 1024
#: Rows, of all splits of all pairs, that a workspace has sums for.
ROWS = 8192


def cells(rows: int) -> int:
    """Splits, of all pairs together, that a workspace holds for blocks of `rows` query rows."""
    return min(COUNTERS, ROWS // rows)


def workspace_floats(dim: int) -> int:
    """The size of a workspace in float32: counters, and of each row a maximum, a sum and `dim` weighted sums of V."""
    return COUNTERS + ROWS * (2 + dim)
