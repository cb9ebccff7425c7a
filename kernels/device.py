"""What the Helion kernels share; called from device code, so every function here is inlined into the kernel.

Triton's `/` on float32 is good to 2 ulp only. The division here is IEEE's, at the price of one approximate reciprocal per
row: with r = 1/s correctly rounded, `q = x*r; q + (x - q*s)*r` is x/s correctly rounded when each `a*b + c` rounds once.
`torch.addcmul` is that fused operation: it becomes `fma.rn.f32` (in torch 2.11 a product and a sum, which Triton's
compiler contracts to it).
"""

from __future__ import annotations

import os

import helion.language as hl
import torch

#: Helion's interpreter runs the kernels as plain Python on the CPU, where there is nothing to release.
INTERPRETED = os.environ.get("HELION_INTERPRET") == "1"


def release_dependents() -> None:
    """Let the next kernel begin to launch: it waits for all that this one writes, but its prologue need not.

    Called where a program has read its inputs. `hl.pdl_launch_dependents` stands at a kernel's entry or exit only.
    """
    if not INTERPRETED:
        hl.inline_triton("tl.extra.cuda.gdc_launch_dependents()", args=(), output_like=None)


def row_scale(absmax: torch.Tensor) -> torch.Tensor:
    """The scale of each row, float32 as `absmax`: max(absmax / 448, 1 / (448 * 512))."""
    inverse = torch.full_like(absmax, 1.0 / 448.0)
    near = absmax * inverse
    exact = torch.addcmul(near, torch.addcmul(absmax, near, torch.full_like(absmax, -448.0)), inverse)
    return torch.clamp(exact, min=1.0 / (448.0 * 512.0))


def divide_rows(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x / scale for x float32 [rows, columns] and scale float32 [rows], positive and finite; |x / scale| is finite."""
    # unsqueeze and expand_as: Helion lowers neither `[:, None]` nor implicit broadcasting by addcmul in a called function.
    near = 1.0 / scale
    inverse = torch.addcmul(near, torch.addcmul(torch.full_like(scale, 1.0), -scale, near), near).unsqueeze(-1)
    quotient = x * inverse
    inverse = inverse.expand_as(x)
    negative = -scale.unsqueeze(-1).expand_as(x)
    return torch.addcmul(quotient, torch.addcmul(x, quotient, negative), inverse)


def clamp_rows(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x with |x| at most 448 * scale of its row: clamping before the division keeps the quotient from overflowing.

    Needed only if scale_ub may have lowered the scale: else the quotient is 448 at most, up to its last bit.
    """
    # torch.clamp would become minima and maxima that carry NaN by hand, at twice the instructions and registers.
    limit = (448.0 * scale).unsqueeze(-1)
    x = torch.where(x > limit, limit, x)
    return torch.where(x < -limit, -limit, x)
