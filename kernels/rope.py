"""What rotary_embedding and fused_qk_norm_rope share: the rotation in plain torch, sample inputs, the kernels' tiles."""

from __future__ import annotations

from typing import Any

import torch

#: Positions in the caches of sample calls.
SAMPLE_POSITIONS = 4096


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, is_neox: bool) -> torch.Tensor:
    """x [..., R] in float32 with each pair (a, b) made (a * cos - b * sin, b * cos + a * sin).

    cos and sin are float32 and broadcast to [..., R / 2]. Pairs are elements i and i + R / 2, or else 2 * i and 2 * i + 1.
    """
    a, b = x.chunk(2, dim=-1) if is_neox else (x[..., ::2], x[..., 1::2])
    turned = a * cos - b * sin, b * cos + a * sin
    return torch.cat(turned, dim=-1) if is_neox else torch.stack(turned, dim=-1).flatten(-2)


def random_cache(
    rotary: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator, positions: int = SAMPLE_POSITIONS
) -> torch.Tensor:
    """Cosines and then sines of random angles, [positions, rotary]."""
    angles = 6.2832 * torch.rand(positions, rotary // 2, generator=generator, device=generator.device)
    return torch.cat((angles.cos(), angles.sin()), dim=-1).to(device=device, dtype=dtype)


def random_positions(tokens: int, device: torch.device, generator: torch.Generator) -> torch.Tensor:
    """Positions [tokens] in int64, of which `random_cache` has rows."""
    return torch.randint(SAMPLE_POSITIONS, (tokens,), generator=generator, device=generator.device).to(device)


def program_tile(head_size: int, is_neox: bool, config: dict[str, Any]) -> tuple[int, int]:
    """Tokens and heads of a program for which loads are vectors of 16 bytes and nothing is exchanged between threads.

    A thread holds the two elements of 8 pairs, of one head of each token. Of interleaved pairs it holds 4: their halves
    of the cache are vectors of 8 bytes, and for more than one token the compiler would make them 16 and exchange them.
    """
    pairs, tokens = (8, config["tokens"]) if is_neox else (4, 1)
    return tokens, config["num_warps"] * 32 * pairs * 2 // head_size
