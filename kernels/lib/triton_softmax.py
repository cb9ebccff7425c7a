"""What the Triton kernels of all attention ops share: scores, in powers of two, and the sums that they weight."""

from __future__ import annotations

import os

import triton
import triton.language as tl

#: Triton's interpreter multiplies bfloat16 as integers, and knows no PTX.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def capped(s, cap):
    """cap * tanh(s / cap) of scores s; both are what the op says, times log2(e)."""
    return cap * (1.0 - 2.0 / (tl.exp2(s * (2.8853900817779268 / cap)) + 1.0))


@triton.jit
def weighted(acc, total):
    """acc / total by rows; 0 of a row that saw no token."""
    return tl.where(total == 0.0, 0.0, 1.0 / total)[:, None] * acc
