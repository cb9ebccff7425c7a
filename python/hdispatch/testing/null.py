"""The null driver's record of launches: what would have gone to the GPU, for tests on a machine without one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .. import _C


@contextmanager
def recording() -> Iterator[None]:
    """Record every launch of the null driver, on all threads, until the block ends; `launches` returns them."""
    _C.null_record(True)
    try:
        yield
    finally:
        _C.null_record(False)


def launches() -> list[dict[str, Any]]:
    """The recorded launches in order.

    Each is {function, file, grid: (x, y, z), block: (x, 1, 1), shared, pdl, cooperative, cluster: (x, y, z),
    params: [bytes, …]} with the two hidden scratch pointers last among the params.
    """
    return _C.null_launches()
