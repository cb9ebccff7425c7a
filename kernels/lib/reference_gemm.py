"""What the declarations of the fp8 matrix products share: sizes of models, sample inputs. Plain torch, on any device."""

from __future__ import annotations

import torch

from .reference_fp8 import FP8, FP8_MAX

#: (K, N) of qkv, out, gate_up and down of Qwen3 1.7B, 8B and 32B.
SHAPES = (
    (2048, 4096),
    (2048, 2048),
    (2048, 12288),
    (6144, 2048),
    (4096, 6144),
    (4096, 4096),
    (4096, 24576),
    (12288, 4096),
    (5120, 10240),
    (8192, 5120),
    (5120, 51200),
    (25600, 5120),
)


def random_fp8(
    rows: int, columns: int, device: torch.device, generator: torch.Generator, spread: float = 100.0
) -> torch.Tensor:
    """Normal numbers [rows, columns] in fp8, `spread` being their standard deviation: as quantized rows are, up to 448."""
    x = torch.randn(rows, columns, generator=generator, device=generator.device, dtype=torch.float32)
    return x.mul_(spread).clamp_(-FP8_MAX, FP8_MAX).to(device=device, dtype=FP8)


def random_scales(shape: tuple[int, ...], device: torch.device, generator: torch.Generator) -> torch.Tensor:
    """Scales [*shape] in float32 around 1 / 1000."""
    return (torch.rand(shape, generator=generator, device=generator.device) * 1.5e-3 + 2.5e-4).to(device)
