"""Triton kernels of many signatures, for adoption. Bodies are as small as they can be: what matters is how they are called."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

SCALE = tl.constexpr(2)
OFFSETS: tl.constexpr = (1, 2)
FACTOR = tl.constexpr(3)


@triton.jit
def nop():
    pass


@triton.jit
def add(x, y, o, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = i < n
    tl.store(o + i, tl.load(x + i, m) + tl.load(y + i, m), m)


@triton.jit
def scalars(o, a, b, flag, n: tl.int64, BLOCK: tl.constexpr = 32):
    tl.store(o + tl.arange(0, BLOCK), (a + b + n) * (1 if flag else 2))


@triton.jit
def typed(o, a: tl.float32, b: tl.int32, c: tl.int1, d: tl.bfloat16):
    tl.store(o, a + b + c + d)


@triton.jit(do_not_specialize=["n", "m"])
def unspecialized(o, n, m, k):
    tl.store(o, n + m + k)


@triton.jit(do_not_specialize_on_alignment=["n", "x"])
def unaligned(x, o, n):
    tl.store(o, tl.load(x) + n)


@triton.jit
def optional(x, bias, o, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr = "relu"):
    v = tl.load(x)
    if HAS_BIAS:
        v += tl.load(bias)
    if ACTIVATION == "relu":
        v = tl.maximum(v, 0.0)
    tl.store(o, v)


@triton.jit
def cast(x, o, DTYPE: tl.constexpr, EPS: tl.constexpr):
    tl.store(o, (tl.load(x) + EPS).to(DTYPE))


@triton.jit
def strides(x, o, sx0, sx1, so0, so1, rows, columns, BLOCK: tl.constexpr, num_groups: tl.constexpr = 1):
    i = tl.program_id(0)
    j = tl.arange(0, BLOCK)
    tl.store(o + i * so0 + j * so1, tl.load(x + i * sx0 + j * sx1, j < columns), (j < columns) & (i < rows))


@triton.jit
def double(x):
    return x * SCALE


@triton.jit
def function_argument(x, o, FUNCTION: tl.constexpr):
    tl.store(o, FUNCTION(tl.load(x)))


@triton.jit
def captured(x, o):
    tl.store(o, tl.load(x) * FACTOR)


@triton.jit
def pointers_last(n, scale, x, o):
    tl.store(o, tl.load(x) * scale + n)


@triton.autotune(
    [triton.Config({"BLOCK": 64}, num_warps=2), triton.Config({"BLOCK": 128}, num_warps=4)],
    key=["n"],
    do_bench=lambda call, **_keywords: (call(), [1.0, 1.0, 1.0])[1],
)
@triton.jit
def tuned(x, o, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(o + i, tl.load(x + i, i < n), i < n)


@triton.heuristics({"EVEN": lambda args: args["n"] % args["BLOCK"] == 0, "num_warps": lambda args: 8 if args["n"] > 100 else 4})
@triton.jit
def heuristic(x, o, n, EVEN: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if EVEN:
        tl.store(o + i, tl.load(x + i))
    else:
        tl.store(o + i, tl.load(x + i, i < n), i < n)


def host_function(x: torch.Tensor) -> torch.Tensor:
    """Allocates its output, as users' wrappers do."""
    out = torch.empty_like(x)
    add[(triton.cdiv(x.numel(), 256),)](x, x, out, x.numel(), BLOCK=256)
    return out
