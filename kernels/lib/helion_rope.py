"""What the Helion kernels of the ops with a rotary embedding share. They rotate whole heads: head_size / 2 pairs."""

from __future__ import annotations

from typing import Any

import torch


def pair_strides(head_size: int, is_neox: bool) -> tuple[int, int]:
    """Of a head as [2, head_size / 2]: pairs are the halves of a head, or interleaved."""
    return (head_size // 2, 1) if is_neox else (1, 2)


def angles_of(cos_sin_cache: torch.Tensor, head_size: int) -> torch.Tensor:
    """The cache as [positions, 2, head_size / 2]: cosines, then sines."""
    return cos_sin_cache.as_strided((cos_sin_cache.size(0), 2, head_size // 2), (head_size, head_size // 2, 1))


def rotated(
    a: torch.Tensor, b: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs rotated by angles, all of them float32 of one shape, in dtype."""
    return (a * cos - b * sin).to(dtype), (b * cos + a * sin).to(dtype)


def check_rotary(op: str, cos_sin_cache: torch.Tensor, head_size: int) -> None:
    """ValueError for a cache of fewer angles than whole heads take: it becomes a guard of the record."""
    if cos_sin_cache.size(1) != head_size:
        raise ValueError(f"{op}: {cos_sin_cache.size(1)} of {head_size} elements rotated; the Helion kernel takes whole heads")


def candidates(tokens: int, head_size: int) -> list[dict[str, Any]]:
    """Configs worth measuring: tiles of some tokens and heads, with 4 to 32 elements of a head in each thread."""
    tiles = [(t, h, w) for t in ((1, 2, 4) if tokens > 64 else (1,)) for h in (4, 8, 2, 16, 1) for w in (1, 2, 4, 8)]
    kept = [(t, h, w) for t, h, w in tiles if 8 <= t * h * head_size // (32 * w) <= 32]
    common = {"num_stages": 1, "indexing": "pointer", "pid_type": "flat"}
    return [{"block_sizes": [t, h], "num_warps": w, **common} for t, h, w in kept]
