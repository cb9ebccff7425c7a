"""The null driver's record of launches: what would have gone to the GPU, for tests on a machine without one."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .. import _C
from ..manifest import TENSOR_MAP_TYPES

#: csrc/driver.h, NullTensorMap: magic, address, 5 sizes, 4 strides, 5 box sizes, type, rank, swizzle, fill. Innermost first.
_FFI_TENSOR = struct.Struct("<QiiiBBH")  # address, device's type and id, rank, dtype's code, bits and lanes
_FFI_VALUE = struct.Struct("<iI8s")  # type, padding, value
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
    Of a host function of a bundle, which is not called, grid and block are 0 and `ffi_argument` reads each of the params.
    """
    return _C.null_launches()


def ffi_argument(param: bytes) -> Any:
    """An argument of a host function: None, an int, bool or float; {pointer}, the stream or a string; or a tensor.

    {address, device: (type, id), dtype: (code, bits, lanes), shape, strides (elements)}, types and codes as DLPack's.
    """
    if len(param) == _FFI_VALUE.size:
        kind, _, value = _FFI_VALUE.unpack(param)
        integer = int.from_bytes(value, "little", signed=True)
        return [None, integer, bool(integer), struct.unpack("<d", value)[0], {"pointer": integer}][min(kind, 4)]
    address, device, index, rank, code, bits, lanes = _FFI_TENSOR.unpack_from(param)
    sizes = struct.unpack_from(f"<{2 * rank}q", param, _FFI_TENSOR.size)
    return {
        "address": address,
        "device": (device, index),
        "dtype": (code, bits, lanes),
        "shape": list(sizes[:rank]),
        "strides": list(sizes[rank:]),
    }


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
