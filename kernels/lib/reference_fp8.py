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
    result    float8_e4m3fn [rows, columns], written: to_fp8(x / scale), a true division
    scale     float32 [rows, 1], written: max(min(max |x| of the row, scale_ub) / 448, 1 / (448 * 512))
    scale_ub  float32 with one element, or None
    """
    largest = absmax(x).unsqueeze(-1)
    if scale_ub is not None:
        largest = torch.fmin(largest, scale_ub.reshape(()))
    row_scale = (largest / torch.full_like(largest, FP8_MAX)).clamp(min=MIN_SCALE)
    scale.copy_(row_scale)
    result.copy_(to_fp8(x / row_scale))


def absmax(x: torch.Tensor) -> torch.Tensor:
    """max |x| along the last dimension; NaN is passed over, as CUDA C's fmaxf does: 0 of NaNs alone, and of nothing."""
    if not x.size(-1):
        return x.new_zeros(x.shape[:-1])
    return torch.where(x.isnan(), torch.zeros_like(x), x.abs()).amax(dim=-1)


def to_fp8(x: torch.Tensor) -> torch.Tensor:
    """clamp(x, -448, 448) in fp8 of x float32, ties to even; NaN becomes 448, as CUDA C's fmaxf(-448, fminf(x, 448))."""
    return torch.fmax(torch.fmin(x, x.new_full((), FP8_MAX)), x.new_full((), -FP8_MAX)).to(FP8)


def silu_and_mul(input: torch.Tensor) -> torch.Tensor:
    """gate * (1 / (1 + exp(-gate))) * up in float32 of input [..., 2 * columns]: gate in the first half, up in the second."""
    gate, up = input.float().chunk(2, dim=-1)
    return gate * torch.reciprocal(1 + torch.exp(-gate)) * up


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
