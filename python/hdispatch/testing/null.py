"""The null driver's record of launches: what would have gone to the GPU, for tests on a machine without one."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .. import _C
from ..manifest import TENSOR_MAP_TYPES

#: csrc/driver.h, NullTensorMap: magic, address, 5 sizes, 4 strides, 5 box sizes, type, rank, swizzle, fill. Innermost first.
_TENSOR_MAP = struct.Struct("<8sQ5Q4Q5H4B26x")


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
    params: [bytes, …]} with the two hidden scratch pointers last among the params. `tensor_map` reads one of 128 bytes.
    """
    return _C.null_launches()


def tensor_map(param: bytes) -> dict[str, Any]:
    """A TMA descriptor of the null driver: what cuTensorMapEncodeTiled was asked for, outermost dimension first.

    {address, shape (elements), strides (bytes, one fewer), box (elements), type, swizzle (bytes), fill ("zero" or "nan")}
    """
    magic, *numbers = _TENSOR_MAP.unpack(param)
    if magic != b"null-map":
        raise ValueError(f"the parameter begins with {magic!r}; the null driver's TMA descriptors begin with b'null-map'")
    address, sizes, strides, box = numbers[0], numbers[1:6], numbers[6:10], numbers[10:15]
    kind, rank, swizzle, fill = numbers[15:]
    return {
        "address": address,
        "shape": sizes[:rank][::-1],
        "strides": strides[: rank - 1][::-1],
        "box": box[:rank][::-1],
        "type": TENSOR_MAP_TYPES[kind],
        "swizzle": 16 << swizzle if swizzle else 0,
        "fill": "nan" if fill else "zero",
    }
