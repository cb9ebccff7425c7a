"""What the torch references and the sample inputs of the fp8 ops share. Plain torch, on any device.

The references round where vLLM's CUDA kernels round. They divide by tensors only: on CUDA, torch turns a division by a
Python number into a multiplication by its reciprocal, which can differ in the last bit.
"""

from __future__ import annotations

import torch

#: Largest finite value of float8 e4m3fn.
FP8_MAX = 448.0
#: Smallest scale that vLLM's dynamic fp8 ops write.
MIN_SCALE = 1.0 / (FP8_MAX * 512.0)
FP8 = torch.float8_e4m3fn


def quantize_rows(x: torch.Tensor, result: torch.Tensor, scale: torch.Tensor, scale_ub: torch.Tensor | None) -> None:
    """Write the rows of `x` to `result` in fp8 and their scales to `scale`.

    x         float32 [rows, columns]
    result    float8_e4m3fn [rows, columns], written: clamp(x / scale, -448, 448), a true division, ties to even
    scale     float32 [rows, 1], written: max(min(max |x| of the row, scale_ub) / 448, 1 / (448 * 512))
    scale_ub  float32 with one element, or None
    """
    absmax = x.abs().amax(dim=-1, keepdim=True) if x.size(-1) else x.new_zeros(x.size(0), 1)
    if scale_ub is not None:
        absmax = torch.minimum(absmax, scale_ub.reshape(()))
    row_scale = (absmax / torch.full_like(absmax, FP8_MAX)).clamp(min=MIN_SCALE)
    scale.copy_(row_scale)
    result.copy_((x / row_scale).clamp(-FP8_MAX, FP8_MAX).to(FP8))


def random_rows(rows: int, columns: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> torch.Tensor:
    """Normal rows [rows, columns] of magnitudes from 1/8 to 8, an outlier in every fourth; of three or more, row 1 is zero."""
    x = torch.randn(rows, columns, generator=generator, device=generator.device)
    x *= torch.exp2(6 * torch.rand(rows, 1, generator=generator, device=generator.device) - 3)
    at = torch.randint(columns, (len(range(0, rows, 4)),), generator=generator, device=generator.device)
    x[torch.arange(0, rows, 4, device=x.device), at] *= 50
    if rows > 2:
        x[1] = 0
    return x.to(device=device, dtype=dtype)


def poisoned_outputs(rows: int, columns: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """A result [rows, columns] in fp8 and a scale [rows, 1] in float32, every element NaN."""
    result = torch.full((rows, columns), 0x7F, dtype=torch.uint8, device=device).view(FP8)
    return result, torch.full((rows, 1), float("nan"), dtype=torch.float32, device=device)


def upper_bound(x: torch.Tensor) -> torch.Tensor:
    """A scale_ub [1] in float32 that clamps a little more than half of the rows of `x` [rows, columns]; 1 of no rows."""
    if not len(x):
        return torch.ones(1, device=x.device)
    return 0.9 * x.float().abs().amax(dim=-1).median().reshape(1)
