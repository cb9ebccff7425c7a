"""What the Helion kernels of the RMS norms share; called from device code."""

from __future__ import annotations

import helion.language as hl
import torch


def inverse_rms(x: torch.Tensor, columns: int, epsilon: float) -> torch.Tensor:
    """1 / sqrt(mean + epsilon) of the squares along the last dimension of x float32, of `columns` elements, kept as 1."""
    return torch.rsqrt(torch.sum(x * x, dim=-1, keepdim=True) * (1.0 / columns) + epsilon)


def weighted(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    """x float32 [..., K] times weights [K] of any dtype, or x of None."""
    # Loaded here: a kernel itself cannot choose between None and a part of a tensor.
    return x if weight is None else x * hl.load(weight, [slice(None)]).to(torch.float32)
