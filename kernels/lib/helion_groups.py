"""What the Helion kernels of the ops with a scale per group share: device code, which Helion inlines, and configs.

A tile is [rows, groups, elements of a group]. Divisions are IEEE's: one per group, not per element.
"""

from __future__ import annotations

from typing import Any

import helion.language as hl
import torch

from .helion_fp8 import INTERPRETED, magnitude


def divided(x: torch.Tensor, y: float) -> torch.Tensor:
    """x / y of float32, rounded as IEEE's division."""
    # No tensor of y: Helion makes none whose size is that of a whole dimension.
    return x / torch.full_like(x, y) if INTERPRETED else hl.inline_triton("tl.div_rn({0}, {1})", args=(x, y), output_like=x)


def reciprocal(x: torch.Tensor) -> torch.Tensor:
    """1 / x of float32, rounded as IEEE's division: infinite of 0, 0 of infinity."""
    return 1.0 / x if INTERPRETED else hl.inline_triton("tl.div_rn(1.0, {0})", args=(x,), output_like=x)


def lesser(x: torch.Tensor, bound: torch.Tensor) -> torch.Tensor:
    """min(x, bound) of x float32 and one number; x for a bound that is NaN."""
    # Not `bounded` of helion_fp8.py: Helion's search for loops over reductions fails at a `where` of groups and a scalar.
    return torch.fmin(x, bound) if INTERPRETED else hl.inline_triton("tl.minimum({0}, {1})", args=(x, bound), output_like=x)


def power_of_two(scale: torch.Tensor) -> torch.Tensor:
    """The least power of two of at least `scale`, float32, normal and positive, or infinite."""
    # A carry out of the mantissa unless it is 0.
    return ((scale.view(torch.int32) + 0x007FFFFF) & 0x7F800000).view(torch.float32)


def absmax_scale(absmax: torch.Tensor) -> torch.Tensor:
    """absmax / 448, rounded as IEEE's division."""
    return divided(absmax, 448.0)


def bounded_scale(scale: torch.Tensor, powers_of_two: bool) -> torch.Tensor:
    """max(scale, 1 / (448 * 512)), or the least power of two above."""
    scale = torch.clamp(scale, min=1.0 / (448.0 * 512.0))
    return power_of_two(scale) if powers_of_two else scale


def eps_scale(x: torch.Tensor, eps: float, fp8_max: float, powers_of_two: bool) -> torch.Tensor:
    """max(max |group|, eps) / fp8_max of each group of a tile x, or the least power of two above; NaN does not count."""
    absmax = torch.clamp(torch.amax(magnitude(x), dim=-1), min=eps)
    scale = divided(absmax, fp8_max)
    # What vLLM bounds a scale by before it rounds it up.
    return power_of_two(torch.clamp(scale, min=1e-10)) if powers_of_two else scale


def clamped_codes(x: torch.Tensor, scale: torch.Tensor, fp8_min: float, fp8_max: float) -> torch.Tensor:
    """min(max(x * (1 / scale), fp8_min), fp8_max) for a tile x and the scales of its groups; NaN becomes fp8_min."""
    # A product, not a division, as in vLLM: it is rounded twice.
    quotient = x * reciprocal(scale).unsqueeze(-1)
    if INTERPRETED:
        return torch.fmin(torch.fmax(quotient, torch.tensor(fp8_min)), torch.tensor(fp8_max))
    bounds = (quotient, fp8_min, fp8_max)
    return hl.inline_triton("tl.minimum(tl.maximum({0}, {1}), {2})", args=bounds, output_like=quotient)


def candidates(rows: int, groups: int, group_size: int) -> list[dict[str, Any]]:
    """Configs worth measuring: tiles of 256 to 8192 elements of one row, of 8 to 32 to a thread."""
    whole = 1 << (groups - 1).bit_length()
    tiles = [(e, w) for e in (1024, 2048, 512, 256, 4096, 8192) for w in (4, 2, 8, 1, 16) if 8 <= e // (32 * w) <= 32]
    work = rows * groups * group_size
    kept = [(e, w) for e, w in tiles if group_size <= e <= whole * group_size and (e <= 1024 or work >= 66 * e)]
    common = {"num_stages": 1, "indexing": "pointer", "pid_type": "flat"}
    return [{"block_sizes": [1, e // group_size], "num_warps": w, **common} for e, w in kept]
