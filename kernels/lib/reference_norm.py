"""What the torch references and the sample inputs of the ops with an RMS norm share. Plain torch, on any device."""

from __future__ import annotations

import torch


def normalized(x: torch.Tensor, weight: torch.Tensor | None, epsilon: float) -> torch.Tensor:
    """x * rsqrt(mean(x * x) + epsilon) * weight in float32, for x float32 [..., K] and weight [K] of any dtype, or None."""
    y = x * torch.rsqrt((x * x).mean(dim=-1, keepdim=True) + epsilon)
    return y if weight is None else y * weight.float()


def twice_rounded(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """(x * rsqrt(mean(x * x) + epsilon) rounded to the dtype of weight) * weight, rounded again: float32 [..., K]."""
    rstd = torch.rsqrt((x * x).mean(dim=-1, keepdim=True) + epsilon)
    return ((x * rstd).to(weight.dtype) * weight).float()


def random_weight(columns: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> torch.Tensor:
    """Weights [columns] around 1."""
    return (1 + 0.2 * torch.randn(columns, generator=generator, device=generator.device)).to(device=device, dtype=dtype)


def summed(x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
    """x, plus residual if there is one, in float32."""
    return x.float() if residual is None else x.float() + residual.float()
