"""What the Triton kernels share; called from device code.

Triton's `/` on float32 is good to 2 ulp only. Where the last bit counts, the divisions here are IEEE's: see device.py,
which does the same for Helion. Tiles are [rows, columns] in float32.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

#: Triton's interpreter, which runs kernels as plain Python on the CPU, knows no PTX.
APPROXIMATE = tl.constexpr(os.environ.get("TRITON_INTERPRET") != "1")


@triton.jit
def row_scale(absmax):
    """The scale of each row, float32 as `absmax`: max(absmax / 448, 1 / (448 * 512))."""
    inverse: tl.constexpr = 1.0 / 448.0
    near = absmax * inverse
    exact = tl.fma(tl.fma(near, -448.0, absmax), inverse, near)
    return tl.maximum(exact, 1.0 / (448.0 * 512.0))


@triton.jit
def divide_rows(x, scale):
    """x / scale for x [rows, columns] and scale [rows], positive and finite; |x / scale| is finite."""
    near = 1.0 / scale
    inverse = tl.fma(tl.fma(-scale, near, 1.0), near, near)[:, None]
    quotient = x * inverse
    return tl.fma(tl.fma(quotient, -scale[:, None], x), inverse, quotient)


@triton.jit
def clamp_rows(x, scale):
    """x with |x| at most 448 * scale of its row; needed only if scale_ub may have lowered the scale."""
    limit = (448.0 * scale)[:, None]
    return tl.minimum(tl.maximum(x, -limit), limit)


@triton.jit
def silu(x):
    """x / (1 + exp(-x)) for x float32, good to a few ulp; 0 below -87, where it is less than 1e-35."""
    if APPROXIMATE:
        # Triton's exp2 and `/` take care of denormal numbers, at twice the instructions.
        sigmoid = tl.inline_asm_elementwise(
            "{.reg .f32 e; mul.f32 e, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 e, e; add.f32 e, e, 0f3F800000; "
            "rcp.approx.ftz.f32 $0, e;}",
            "=f,f",
            [x],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
        return x * sigmoid
    return x / (1.0 + tl.exp2(x * -1.4426950408889634))


@triton.jit
def fp8_times(x, inverse):
    """clamp(x * inverse, -448, 448) in fp8, for x of any float dtype and inverse a float32; NaN becomes 448."""
    quotient = x.to(tl.float32) * inverse
    return tl.clamp(quotient, -448.0, 448.0).to(tl.float8e4nv)
