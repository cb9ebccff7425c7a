"""What kernels that find the largest of a row, as torch's argmax does, have in common; called from device code."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def ranked(x):
    """An int32 for each number, which compares as torch's argmax compares the numbers; never the least int32."""
    x = x.to(tl.float32) + 0.0  # -0 becomes 0
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(x != x, 0x7FFFFFFF, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits))


@triton.jit
def keyed(rank, column):
    """An int64 for each rank at a column below 2**31: of equal ranks that of the lower column is the larger."""
    return (rank.to(tl.int64) << 32) | (0x7FFFFFFF - column).to(tl.int64)


@triton.jit
def column_of(key):
    """The column of such an int64."""
    return 0x7FFFFFFF - (key & 0x7FFFFFFF)
