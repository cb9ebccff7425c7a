"""What the torch references and the sample inputs of the ops with a scale per group share. Plain torch, on any device.

A group is `group_size` neighbouring elements of a row; the last one of a row may be shorter. See numerics.py about rounding.
"""

from __future__ import annotations

import torch

from .numerics import FP8, FP8_MAX, MIN_SCALE

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


def quantize_groups(
    groups: torch.Tensor, scale: torch.Tensor, result: torch.Tensor, fp8_min: float = -FP8_MAX, fp8_max: float = FP8_MAX
) -> None:
    """Write clamp(groups / scale, fp8_min, fp8_max) to result [rows, columns] in fp8, ties to even; a true division.

    groups [rows, groups of a row, group_size] and scale [rows, groups of a row] are float32.
    """
    quotient = (groups / scale.unsqueeze(-1)).clamp(fp8_min, fp8_max).to(FP8)
    result.copy_(quotient.flatten(1)[:, : result.shape[1]])


def poisoned_outputs(rows: int, columns: int, group_size: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """A result [rows, columns] in fp8 and a float32 scale per group, row-major, every element NaN."""
    result = torch.full((rows, columns), 0x7F, dtype=torch.uint8, device=device).view(FP8)
    return result, torch.full((rows, -(-columns // group_size)), float("nan"), device=device)
