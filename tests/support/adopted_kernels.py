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


@triton.heuristics({"EVEN": lambda args: args["n"] % 16 == 0})
@triton.autotune(
    [triton.Config({"BLOCK": 64}, num_warps=2), triton.Config({"BLOCK": 128}, num_warps=4, num_stages=2)],
    key=["n", "step"],
    do_bench=lambda call, **_keywords: (call(), [1.0, 1.0, 1.0])[1],
)
@triton.jit
def tuned_of_two(x, o, n, step, EVEN: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(o + i * step, tl.load(x + i, i < n), i < n)


@triton.heuristics({"SIZE": lambda args: triton.next_power_of_2(args["x"].numel()), "ODD": lambda args: args["n"] % 2 == 1})
@triton.jit
def heuristic_of_tensors(x, o, n, SIZE: tl.constexpr, ODD: tl.constexpr):
    pass


# Of these only the signatures matter.


@triton.jit
def any_dtypes(x, y, o):
    pass


@triton.jit
def integers(a, b, c, d, e, f, g, h):
    pass


@triton.jit
def floats(a, b, c, d):
    pass


@triton.jit
def bools(a, b, c, d):
    pass


@triton.jit
def nones(a, b, c):
    pass


@triton.jit
def defaults(x, n=1, m=16, k=2**31, scale=1.0, flag=False):
    pass


@triton.jit
def constants(A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, D: tl.constexpr):
    pass


@triton.jit
def small_integers(a: tl.int8, b: tl.int16, c: tl.int32, d: tl.int64):
    pass


@triton.jit
def unsigned(a: tl.uint8, b: tl.uint32, c: tl.uint64):
    pass


@triton.jit
def by_index(x, n, k, m):
    pass


@triton.jit
def no_alignment(x, y, n):
    pass


@triton.jit
def debugged(x, n):
    pass


@triton.jit
def three_strides(x, a, b, c, d, e, f, o, BLOCK: tl.constexpr):
    pass


@triton.jit
def nineteen(
    t1, t2, t3, t4, t5, i1, i2, i3, i4, i5, i6, i7, i8, i9,
    c1: tl.constexpr, c2: tl.constexpr, c3: tl.constexpr, c4: tl.constexpr, c5: tl.constexpr,
):  # fmt: skip
    pass


@triton.jit
def mixed(n, y, scale, nothing, flag, C: tl.constexpr, x, m):
    pass


@triton.jit
def named(x, y, n, s):
    pass


@triton.jit
def options(x, n):
    i = tl.arange(0, 64)
    tl.store(x + i, tl.load(x + i, i < n), i < n)  # what a cluster of blocks shares


@triton.jit
def fifty_eight(
    t1, t2, t3, t4, t5, t6, t7, t8, t9, t10, t11, t12, t13, t14, i1, i2, i3, i4, i5, i6, i7, i8, i9, i10, i11, i12, i13, i14,
    i15, i16, i17, i18, i19, i20, i21, i22, i23, i24, i25, i26, c1: tl.constexpr, c2: tl.constexpr, c3: tl.constexpr,
    c4: tl.constexpr, c5: tl.constexpr, c6: tl.constexpr, c7: tl.constexpr, c8: tl.constexpr, c9: tl.constexpr,
    c10: tl.constexpr, c11: tl.constexpr, c12: tl.constexpr, c13: tl.constexpr, c14: tl.constexpr, c15: tl.constexpr,
    c16: tl.constexpr, c17: tl.constexpr, c18: tl.constexpr,
):  # fmt: skip
    pass


@triton.jit
def tuples(pair, x, n):
    pass


@triton.jit
def unspecialized_tuples(n, some, other):
    pass


@triton.jit
def refused(x, n, BLOCK: tl.constexpr):
    pass


def host_function(x: torch.Tensor) -> torch.Tensor:
    """Allocates its output, as users' wrappers do."""
    out = torch.empty_like(x)
    add[(triton.cdiv(x.numel(), 256),)](x, x, out, x.numel(), BLOCK=256)
    return out
