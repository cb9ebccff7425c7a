"""What the declarations of the fp8 matrix products share: sample inputs. Plain torch, on any device."""

from __future__ import annotations

import torch

from .reference_fp8 import FP8, FP8_MAX


def random_fp8(
    rows: int, columns: int, device: torch.device, generator: torch.Generator, spread: float = 100.0
) -> torch.Tensor:
    """Normal numbers [rows, columns] in fp8, `spread` being their standard deviation: as quantized rows are, up to 448."""
    x = torch.randn(rows, columns, generator=generator, device=generator.device, dtype=torch.float32)
    return x.mul_(spread).clamp_(-FP8_MAX, FP8_MAX).to(device=device, dtype=FP8)


def random_scales(shape: tuple[int, ...], device: torch.device, generator: torch.Generator) -> torch.Tensor:
    """Scales [*shape] in float32 around 1 / 1000."""
    return (torch.rand(shape, generator=generator, device=generator.device) * 1.5e-3 + 2.5e-4).to(device)
