"""What the Triton kernels share; called from device code.

Triton's `/` on float32 is good to 2 ulp only. Where the last bit counts, the divisions here are IEEE's: see helion_fp8.py,
which does the same for Helion. Tiles are [rows, columns] in float32.

`tl.maximum` and `tl.minimum` return the number where one of two is NaN, as CUDA C's fmaxf and fminf do; so the order in
which a clamp names its bounds decides what NaN becomes. Triton's interpreter, unlike the GPU, carries NaN through both.

`-x` is 0 - x in Triton: an instruction, and +0 of both zeros. `x * -1.0` becomes a negated operand.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

from .ptx import SIGMOID, SILU, WIDEN

#: Triton's interpreter, which runs kernels as plain Python on the CPU, knows no PTX.
APPROXIMATE = tl.constexpr(os.environ.get("TRITON_INTERPRET") != "1")

#: The least scale of a row or group, where none is given.
MIN_SCALE = tl.constexpr(1.0 / (448.0 * 512.0))

#: See ptx.py.
PTX_SIGMOID = tl.constexpr(SIGMOID)
PTX_SILU = tl.constexpr(SILU)
PTX_WIDEN = tl.constexpr(WIDEN)


@triton.jit
def widened(x):
    """x of any float dtype in float32."""
    if APPROXIMATE and x.dtype == tl.bfloat16:
        wide = tl.inline_asm_elementwise(PTX_WIDEN, "=f,=f,r", [x], dtype=tl.float32, is_pure=True, pack=2)
    else:
        wide = x.to(tl.float32)
    return wide


@triton.jit
def absmax_scale(absmax, fp8_max, inverse):
    """absmax / fp8_max, rounded as IEEE's division, also of infinities; inverse is the reciprocal of fp8_max."""
    near = absmax * inverse
    exact = tl.fma(tl.fma(near, -fp8_max, absmax), inverse, near)
    # Of infinity the remainder is NaN.
    return tl.where(absmax == float("inf"), absmax, exact)


@triton.jit
def row_scale(absmax):
    """The scale of each row, float32 as `absmax`: max(absmax / 448, 1 / (448 * 512)); the least one where absmax is NaN."""
    return tl.maximum(absmax_scale(absmax, 448.0, 1.0 / 448.0), MIN_SCALE)


@triton.jit
def bounded(absmax, bound):
    """min(absmax, bound); 0 for an absmax that is NaN, which a row of NaNs has, and absmax for a bound that is."""
    return tl.minimum(tl.maximum(absmax, 0.0), bound)


@triton.jit
def divide_rows(x, scale):
    """min(x / scale, 448) for x [rows, columns] and scale [rows], positive, not NaN; 448 where x / scale is NaN.

    |x / scale| does not overflow. Signs of zeros are kept. An infinite scale makes zeros of finite x.
    """
    finite = scale < float("inf")
    near = 1.0 / scale
    inverse = tl.where(finite, tl.fma(tl.fma(-scale, near, 1.0), near, near), 0.0)[:, None]
    divisor = tl.where(finite, scale, 0.0)[:, None]
    quotient = x * inverse
    # The remainder is taken with its sign reversed: added to a zero as it is, it would lose the sign of a negative one.
    exact = tl.fma(tl.fma(quotient, divisor, x * -1.0), inverse * -1.0, quotient)
    return tl.minimum(exact, 448.0)


@triton.jit
def clamp_rows(x, scale):
    """x with |x| at most 448 * scale of its row, also of NaN; needed only if scale_ub may have lowered the scale."""
    limit = (448.0 * scale)[:, None]
    return tl.maximum(tl.minimum(x, limit), -limit)


@triton.jit
def reciprocal(x):
    """1 / x, correctly rounded but for a few mantissas of ones, for x float32 from 2**-126 to 2**126.

    0 of larger finite x; NaN of 0, of infinities and of NaN.
    """
    if APPROXIMATE:
        near = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        near = tl.where(x > 8.507059173023462e37, 0.0, 1.0 / x)
    return tl.fma(tl.fma(x * -1.0, near, 1.0), near, near)


@triton.jit
def silu(x):
    """x * (1 / (1 + exp(-x))) for x float32, bit for bit as CUDA C has it.

    The reciprocal is subnormal below -87.33 and 0 below -88.72, where exp overflows; NaN of -inf.
    """
    if APPROXIMATE:
        sigmoid = tl.inline_asm_elementwise(PTX_SIGMOID, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        sigmoid = 1.0 / (1.0 + tl.exp(x * -1.0))
    return x * sigmoid


@triton.jit
def divided_silu(x):
    """x / (1 + exp(-x)) for x float32; NaN of -inf.

    For x of 16 bits it is bit for bit as CUDA C has it once rounded to x's own dtype; before that the last bit may differ.
    """
    if APPROXIMATE:
        quotient = tl.inline_asm_elementwise(PTX_SILU, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        quotient = x / (1.0 + tl.exp(x * -1.0))
    return quotient


@triton.jit
def fp8_times(x, inverse):
    """clamp(x * inverse, -448, 448) in fp8, for x of any float dtype and inverse a float32; NaN becomes 448."""
    quotient = widened(x) * inverse
    return tl.clamp(quotient, -448.0, 448.0).to(tl.float8e4nv)
