"""What the torch references and the sample inputs of the ops with a scale per group share. Plain torch, on any device.

A group is `group_size` neighbouring elements of a row; the last one of a row may be shorter. Rounding is that of
reference_fp8.py.
"""

from __future__ import annotations

import torch
from hdispatch.opspec import Variant

from .reference_fp8 import FP8, FP8_MAX, MIN_SCALE, absmax, to_fp8

#: What vLLM bounds a scale by before it rounds it up to a power of two.
LEAST_ROUNDED = 1e-10


def split_groups(x: torch.Tensor, group_size: int) -> torch.Tensor:
    """x [rows, columns] as [rows, groups, group_size], a shorter last group filled up with zeros."""
    rows, columns = x.shape
    group_size = max(min(group_size, columns), 1)  # a longer one needs no zeros
    groups = -(-columns // group_size)
    padded = torch.nn.functional.pad(x, (0, groups * group_size - columns))
    return padded.reshape(rows, groups, group_size)


def power_of_two(scale: torch.Tensor) -> torch.Tensor:
    """exp2(ceil(log2(max(scale, 1e-10)))) of float32 numbers, exactly: the exponent goes up if the mantissa is not 0."""
    bits = scale.clamp(min=LEAST_ROUNDED).contiguous().view(torch.int32)
    return ((bits + 0x007FFFFF) & 0x7F800000).view(torch.float32)


def absmax_scale(absmax: torch.Tensor, fp8_max: float = FP8_MAX) -> torch.Tensor:
    """absmax / fp8_max, a true division in float32."""
    return absmax / torch.full_like(absmax, fp8_max)


def bounded_scale(scale: torch.Tensor, scale_ue8m0: bool) -> torch.Tensor:
    """scale, but at least 1 / (448 * 512), and only then, if scale_ue8m0, rounded up to a power of two: 2**-17 or more."""
    scale = scale.clamp(min=MIN_SCALE)
    return power_of_two(scale) if scale_ue8m0 else scale


def times_inverse(groups: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """groups * (1 / scale), the reciprocal rounded before it is multiplied by: float32 [rows, groups of a row, group_size]."""
    return groups * (torch.ones_like(scale) / scale).unsqueeze(-1)


def clamp_low_first(x: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """clamp(x, low, high) of x float32; NaN becomes low, as CUDA C's fminf(fmaxf(x, low), high) makes it."""
    return torch.fmin(torch.fmax(x, x.new_full((), low)), x.new_full((), high))


def store_groups(groups: torch.Tensor, result: torch.Tensor) -> None:
    """Write to_fp8(groups), float32 [rows, groups of a row, group_size], to result [rows, columns]."""
    result.copy_(to_fp8(groups).flatten(1)[:, : result.shape[1]])


def scaled_groups(x: torch.Tensor, group_size: int, eps: float, fp8_max: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The groups of x [rows, columns] in float32, and max(max |group|, eps) / fp8_max of each."""
    groups = split_groups(x.float(), group_size)
    return groups, absmax_scale(absmax(groups).clamp(min=eps), fp8_max)


def store_clamped(groups: torch.Tensor, scale: torch.Tensor, low: float, high: float, result: torch.Tensor) -> None:
    """Write clamp(groups * (1 / scale), low, high) in fp8 to result [rows, columns]; NaN becomes low."""
    store_groups(clamp_low_first(times_inverse(groups, scale), low, high), result)


def poisoned_outputs(rows: int, columns: int, group_size: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """A result [rows, columns] in fp8 and a float32 scale per group, row-major, every element NaN."""
    result = torch.full((rows, columns), 0x7F, dtype=torch.uint8, device=device).view(FP8)
    return result, torch.full((rows, -(-columns // group_size)), float("nan"), device=device)


def not_ub_and_ue8m0(variant: Variant) -> bool:
    """`served` of ops that take both scale_ub and scale_ue8m0: all variants but those with both."""
    return "scale_ub" in variant.none or not variant.static["scale_ue8m0"]
