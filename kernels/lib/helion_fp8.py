"""What the Helion kernels share; called from device code, so every function here is inlined into the kernel.

Triton's `/` on float32 is good to 2 ulp only. The division here is IEEE's, at the price of one approximate reciprocal per
row: with r = 1/s correctly rounded, `q = x*r; q + (x - q*s)*r` is x/s correctly rounded when each `a*b + c` rounds once.
`torch.addcmul` is that fused operation: it becomes `fma.rn.f32` (in torch 2.11 a product and a sum, which Triton's
compiler contracts to it).

NaN: what vLLM's kernels do with it follows from fmaxf and fminf of CUDA C, which return the number. torch's maximum and
minimum carry NaN, by hand and at twice the instructions; so the two that touch every element are Triton's own.
"""

from __future__ import annotations

import os

import helion.language as hl
import torch

from .ptx import SIGMOID, SILU, WIDEN

#: Helion's interpreter runs the kernels as plain Python on the CPU, where there is nothing to release.
INTERPRETED = os.environ.get("HELION_INTERPRET") == "1"

#: Triton's source for the sigmoid of {0}; its other braces are doubled, because it is formatted.
INLINE_SIGMOID = f'tl.inline_asm_elementwise("{{{SIGMOID}}}", "=f,f", [{{0}}], tl.float32, True, 1)'
#: The same for the silu of {0}.
INLINE_SILU = f'tl.inline_asm_elementwise("{{{SILU}}}", "=f,f", [{{0}}], tl.float32, True, 1)'
#: The same for the float32 numbers of {0}, bfloat16.
INLINE_WIDEN = f'tl.inline_asm_elementwise("{WIDEN}", "=f,=f,r", [{{0}}], tl.float32, True, 2)'


def release_dependents() -> None:
    """Let the next kernel begin to launch: it waits for all that this one writes, but its prologue need not.

    Called where a program has read its inputs. `hl.pdl_launch_dependents` stands at a kernel's entry or exit only.
    """
    if not INTERPRETED:
        hl.inline_triton("tl.extra.cuda.gdc_launch_dependents()", args=(), output_like=None)


def widened(x: torch.Tensor) -> torch.Tensor:
    """x of any float dtype in float32; see widened of triton_fp8.py."""
    wide = x.to(torch.float32)
    if INTERPRETED or x.dtype != torch.bfloat16:
        return wide
    return hl.inline_triton(INLINE_WIDEN, args=(x,), output_like=wide)


def magnitude(x: torch.Tensor, of_nan: float = 0.0) -> torch.Tensor:
    """|x| of x float32, `of_nan`, which is at most 0, of NaN."""
    if INTERPRETED:
        return torch.where(x.isnan(), torch.full_like(x, of_nan), x.abs())
    return hl.inline_triton(f"tl.maximum(tl.abs({{0}}), {of_nan})", args=(x,), output_like=x)


def at_most_448(x: torch.Tensor) -> torch.Tensor:
    """min(x, 448) of x float32, 448 of NaN."""
    if INTERPRETED:
        return torch.fmin(x, torch.full_like(x, 448.0))
    return hl.inline_triton("tl.minimum({0}, 448.0)", args=(x,), output_like=x)


def within_448(x: torch.Tensor) -> torch.Tensor:
    """clamp(x, -448, 448) of x float32, 448 of NaN."""
    if INTERPRETED:
        return torch.fmax(torch.fmin(x, torch.full_like(x, 448.0)), torch.full_like(x, -448.0))
    return hl.inline_triton("tl.maximum(tl.minimum({0}, 448.0), -448.0)", args=(x,), output_like=x)


def silu(x: torch.Tensor) -> torch.Tensor:
    """x * (1 / (1 + exp(-x))) for x float32; see silu of triton_fp8.py."""
    if INTERPRETED:
        return x * (1.0 / (1.0 + torch.exp(x * -1.0)))
    return x * hl.inline_triton(INLINE_SIGMOID, args=(x,), output_like=x)


def divided_silu(x: torch.Tensor) -> torch.Tensor:
    """x / (1 + exp(-x)) for x float32; see divided_silu of triton_fp8.py."""
    return x / (1.0 + torch.exp(x * -1.0)) if INTERPRETED else hl.inline_triton(INLINE_SILU, args=(x,), output_like=x)


def bounded(absmax: torch.Tensor, bound: torch.Tensor) -> torch.Tensor:
    """min(absmax, bound); absmax for a bound that is NaN."""
    return torch.where(bound < absmax, bound, absmax)


def row_scale(absmax: torch.Tensor) -> torch.Tensor:
    """The scale of each row, float32 as `absmax`: max(absmax / 448, 1 / (448 * 512))."""
    inverse = torch.full_like(absmax, 1.0 / 448.0)
    near = absmax * inverse
    exact = torch.addcmul(near, torch.addcmul(absmax, near, torch.full_like(absmax, -448.0)), inverse)
    # Of infinity the remainder is NaN.
    return torch.clamp(torch.where(absmax == float("inf"), absmax, exact), min=1.0 / (448.0 * 512.0))


def divide_rows(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """min(x / scale, 448) for x float32 [rows, columns] and scale float32 [rows], positive, not NaN; 448 of NaN.

    |x / scale| does not overflow. Signs of zeros are kept. An infinite scale makes zeros of finite x.
    """
    # unsqueeze and expand_as: Helion lowers neither `[:, None]` nor implicit broadcasting by addcmul in a called function.
    finite = scale < float("inf")
    nothing = torch.zeros_like(scale)
    near = 1.0 / scale
    inverse = torch.addcmul(near, torch.addcmul(torch.full_like(scale, 1.0), -scale, near), near)
    inverse = torch.where(finite, inverse, nothing).unsqueeze(-1)
    quotient = x * inverse
    # `-x` would be 0 - x: +0 of both zeros.
    negative = inverse.expand_as(x) * -1.0
    divisor = torch.where(finite, scale, nothing).unsqueeze(-1).expand_as(x)
    # The remainder is taken with its sign reversed: added to a zero as it is, it would lose the sign of a negative one.
    return at_most_448(torch.addcmul(quotient, torch.addcmul(x * -1.0, quotient, divisor), negative))


def number_in(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """The first number in a tensor, or None of None: Helion joins no such two branches of a kernel itself."""
    return None if tensor is None else hl.load(tensor, [0])


def clamp_rows(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x with |x| at most 448 * scale of its row: clamping before the division keeps the quotient from overflowing.

    Needed only if scale_ub may have lowered the scale: else the quotient is 448 at most, up to its last bit.
    """
    # torch.clamp would become minima and maxima that carry NaN by hand, at twice the instructions and registers.
    limit = (448.0 * scale).unsqueeze(-1)
    x = torch.where(x > limit, limit, x)
    return torch.where(x < -limit, -limit, x)


def scale_rows(x: torch.Tensor, bound: torch.Tensor | None) -> torch.Tensor:
    """The scale of each row of x, float32, whose magnitudes count up to `bound`, unless that is None."""
    absmax = torch.amax(magnitude(x), dim=-1)
    return row_scale(absmax if bound is None else bounded(absmax, bound))


def quantize_rows(x: torch.Tensor, scale: torch.Tensor, bound: torch.Tensor | None) -> torch.Tensor:
    """x / scale of each row, float32, for the scales of `scale_rows`."""
    return divide_rows(x if bound is None else clamp_rows(x, scale), scale)
