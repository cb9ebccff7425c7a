"""The Triton kernel of rotary_embedding: a tile of heads of a few tokens per program, query and key in one launch."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from hdispatch.opspec import Variant

from ..lib import triton_rope as lib

GENERIC = ("K", "N")


@triton.jit
def rotary_embedding(
    query, key, positions, cos_sin_cache, tokens, query_stride, key_stride, query_heads, key_heads, query_tiles, sixteenths,
    D: tl.constexpr, NEOX: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Rotates HEADS heads of TOKENS tokens; the tiles of the key follow those of the query."""
    half = sixteenths * 8
    of_query, token, head, inside = lib.heads_of_tile(tokens, query_tiles, query_heads, key_heads, TOKENS, HEADS)
    stride = tl.where(of_query, query_stride, key_stride)
    at = tl.where(of_query, query, key) + (token.to(tl.int64) * stride + head * D)[:, None]
    pair = tl.arange(0, D // 2)[None, :]
    rotated = inside & (pair < half)
    column = tl.arange(0, D)[None, :]
    in_pairs = inside & (column < 2 * half)

    if PDL:
        tl.extra.cuda.gdc_wait()
    # The heads before the angles: their loads do not wait for the position.
    position = tl.load(positions + token, token < tokens, other=0)
    if NEOX:
        a = tl.load(at + pair, rotated).to(tl.float32)
        b = tl.load(at + half + pair, rotated).to(tl.float32)
    else:
        a = tl.load(at + column, in_pairs).to(tl.float32)
        b = a
    angle = cos_sin_cache + (position * (2 * half))[:, None] + pair
    cos = tl.load(angle, rotated).to(tl.float32)
    sin = tl.load(angle + half, rotated).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()

    a, b = lib.turned(a, b, cos, sin, query.dtype.element_ty, D, NEOX)
    if NEOX:
        tl.store(at + pair, a, rotated)
        tl.store(at + half + pair, b, rotated)
    else:
        tl.store(at + column, tl.reshape(tl.join(a, b), (TOKENS * HEADS, D)), in_pairs)


def launch(positions, query, key, head_size, cos_sin_cache, is_neox, _rope_dim_offset=0, _inverse=False, *, config, _launcher):
    """One program per `tokens` tokens and as many heads as give each thread two vectors, or one of interleaved pairs."""
    keys = query if key is None else key
    query_size, key_size = query.size(1), 0 if key is None else keys.size(1)
    if query_size % head_size != 0 or key_size % head_size != 0:
        raise ValueError(f"rotary_embedding: rows of {query_size} and {key_size} elements are not heads of {head_size}")
    sixteenths = lib.check_rotary("rotary_embedding", cos_sin_cache, head_size)
    query_heads, key_heads = query_size // head_size, key_size // head_size
    grid, tiles = lib.tiles(query.size(0), (query_heads, key_heads), head_size, is_neox, config)
    tensors = (query, keys, positions, cos_sin_cache)
    sizes = (query.size(0), query.stride(0), keys.stride(0), query_heads, key_heads, tiles[0], sixteenths)
    _launcher(rotary_embedding, grid, *tensors, *sizes, **lib.options(head_size, is_neox, config))


def candidates(sizes: dict[str, int], _variant: Variant) -> list[dict[str, Any]]:
    """Configs worth measuring: those of the fused ops, and longer programs, which have no norm to wait for."""
    return lib.candidates(sizes) + ([{"tokens": 4, "num_warps": 4}] if sizes["M"] > 512 else [])
