"""What the declarations of the ops with a rotary embedding share: the rotation in torch, sample inputs, heads of models."""

from __future__ import annotations

import torch
from hdispatch.errors import ArgumentError

from .model_sizes import LISTED

#: Positions in the caches of sample calls.
SAMPLE_POSITIONS = 4096
#: Heads of q and of k in rows of K elements, for heads of 128.
_HEADS = {model.q + 2 * model.kv: (model.heads, model.kv_heads) for model in LISTED}


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, is_neox: bool) -> torch.Tensor:
    """x [..., R] in float32 with each pair (a, b) made (a * cos - b * sin, b * cos + a * sin).

    cos and sin are float32 and broadcast to [..., R / 2]. Pairs are elements i and i + R / 2, or else 2 * i and 2 * i + 1.
    """
    a, b = x.chunk(2, dim=-1) if is_neox else (x[..., ::2], x[..., 1::2])
    turned = a * cos - b * sin, b * cos + a * sin
    return torch.cat(turned, dim=-1) if is_neox else torch.stack(turned, dim=-1).flatten(-2)


def check_rotary(op: str, cos_sin_cache: torch.Tensor, head_dim: int) -> None:
    """ArgumentError for a cache of an odd number of elements, or of more than a head has."""
    rotary = cos_sin_cache.size(1)
    if rotary > head_dim or rotary % 2:
        raise ArgumentError(
            f"{op}: cos_sin_cache rotates {rotary} elements; expected an even number, at most head_dim, {head_dim}"
        )


def random_cache(
    rotary: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator, positions: int = SAMPLE_POSITIONS
) -> torch.Tensor:
    """Cosines and then sines of random angles, [positions, rotary]."""
    angles = 6.2832 * torch.rand(positions, rotary // 2, generator=generator, device=generator.device)
    return torch.cat((angles.cos(), angles.sin()), dim=-1).to(device=device, dtype=dtype)


def random_positions(tokens: int, device: torch.device, generator: torch.Generator) -> torch.Tensor:
    """Positions [tokens] in int64, of which `random_cache` has rows."""
    return torch.randint(SAMPLE_POSITIONS, (tokens,), generator=generator, device=generator.device).to(device)


def split_heads(k: int, head_dim: int) -> tuple[int, int]:
    """Heads of q and of k in a row of K elements; where no model is known, about half and a quarter of them."""
    if head_dim == 128 and k in _HEADS:
        return _HEADS[k]
    k_heads = (k // head_dim + 2) // 4
    return k // head_dim - 2 * k_heads, k_heads


def foreign_key(key: dict[str, int]) -> dict[str, int]:
    """vLLM's config files name the heads, of 128 elements, where ours name the elements of a row."""
    if not {"q_heads", "kv_heads"} <= key.keys():
        return key
    others = {name: size for name, size in key.items() if name not in ("q_heads", "kv_heads")}
    return {"hidden_size": (key["q_heads"] + 2 * key["kv_heads"]) * 128, **others}
