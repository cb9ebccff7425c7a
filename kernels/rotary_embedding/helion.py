"""The Helion kernel of rotary_embedding: some heads of some tokens per program; those of the key follow those of the query."""

from __future__ import annotations

from typing import Any

import helion
import helion.language as hl
import torch
from hdispatch.opspec import Variant

from ..lib import helion_rope as lib
from ..lib.helion_fp8 import release_dependents
from ..lib.helion_rope import angles_of, pair_strides, rotated


# 64-bit offsets: see dynamic_per_token_scaled_fp8_quant. Helion warns of asking whether a tensor is None.
@helion.kernel(static_shapes=False, index_dtype=torch.int64, ignore_warnings=[helion.exc.TensorOperationInWrapper])
def rotary_embedding(
    positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor | None, head_size: hl.constexpr,
    cos_sin_cache: torch.Tensor, is_neox: hl.constexpr, rope_dim_offset: hl.constexpr, inverse: hl.constexpr,
) -> None:  # fmt: skip
    m, k = query.size()
    keys = query if key is None else key
    query_heads = hl.specialize(k) // head_size
    key_heads = 0 if key is None else hl.specialize(keys.size(1)) // head_size
    half, strides = head_size // 2, pair_strides(head_size, is_neox)
    of_query = query.as_strided((m, query_heads, 2, half), (query.stride(0), head_size, *strides))
    of_key = keys.as_strided((m, key_heads, 2, half), (keys.stride(0), head_size, *strides))
    query_a, query_b, key_a, key_b = of_query[:, :, 0, :], of_query[:, :, 1, :], of_key[:, :, 0, :], of_key[:, :, 1, :]
    angles = angles_of(cos_sin_cache, head_size)
    hl.pdl_wait()
    for tokens, head in hl.tile([m, query_heads + key_heads]):
        pair = hl.arange(half, dtype=torch.int32)
        # A position for every head: so angles get the heads' layout in registers, and no exchange is needed.
        position = positions[tokens][:, None] + head.index[None, :] * 0
        cos = angles[position, 0, :].to(torch.float32)
        sin = angles[position, 1, :].to(torch.float32)
        is_query = (position[:, :, None] * 0 + pair[None, None, :] * 0 + head.index[None, :, None]) < query_heads
        other = head.index - query_heads
        a = hl.load(query_a, [tokens, head, pair], extra_mask=is_query)
        b = hl.load(query_b, [tokens, head, pair], extra_mask=is_query)
        if key is not None:
            a = torch.where(is_query, a, hl.load(key_a, [tokens, other, pair], extra_mask=~is_query))
            b = torch.where(is_query, b, hl.load(key_b, [tokens, other, pair], extra_mask=~is_query))
        release_dependents()
        x, y = rotated(a.to(torch.float32), b.to(torch.float32), cos, sin, query.dtype)
        hl.store(query_a, [tokens, head, pair], x, extra_mask=is_query)
        hl.store(query_b, [tokens, head, pair], y, extra_mask=is_query)
        if key is not None:
            hl.store(key_a, [tokens, other, pair], x, extra_mask=~is_query)
            hl.store(key_b, [tokens, other, pair], y, extra_mask=~is_query)


KERNEL = rotary_embedding


def check(
    _positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor | None, head_size: int, cache: torch.Tensor, *_: Any
) -> None:
    """ValueError for what the kernel does not take: these become guards of the record."""
    if query.size(1) % head_size or (key is not None and key.size(1) % head_size):
        raise ValueError(f"rotary_embedding: rows of query or key are not heads of {head_size}")
    lib.check_rotary("rotary_embedding", cache, head_size)


def candidates(sizes: dict[str, int], variant: Variant) -> list[dict[str, Any]]:
    """Configs worth measuring."""
    return lib.candidates(sizes["M"], int(variant.static["head_size"]))
