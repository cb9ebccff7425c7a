"""The Triton kernel of rotary_embedding: a tile of heads of a few tokens per program, query and key in one launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from hdispatch.opspec import Variant

from ..lib import triton_rope as lib

GENERIC = ("K", "N")
INDEX_BITS = 64


@triton.jit
def rotary_embedding(
    query,
    key,
    positions,
    cos_sin_cache,
    tokens,
    query_stride,
    key_stride,
    query_heads,
    key_heads,
    query_tiles,
    sixteenths,
    D: tl.constexpr,
    NEOX: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Rotates HEADS heads of TOKENS tokens; the tiles of the key follow those of the query.

    sixteenths is the rotary dimension / 16: so its rows are seen to be aligned.
    """
    ROWS: tl.constexpr = TOKENS * HEADS
    half = sixteenths * 8
    rows = tl.arange(0, ROWS)
    token = tl.program_id(0) * TOKENS + rows // HEADS
    tile = tl.program_id(1)
    of_query = tile < query_tiles
    head = tl.where(of_query, tile, tile - query_tiles) * HEADS + rows % HEADS
    inside = ((token < tokens) & (head < tl.where(of_query, query_heads, key_heads)))[:, None]
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
        a, b = tl.split(tl.reshape(tl.load(at + column, in_pairs), (ROWS, D // 2, 2)).to(tl.float32))
    angle = cos_sin_cache + (position * (2 * half))[:, None] + pair
    cos = tl.load(angle, rotated).to(tl.float32)
    sin = tl.load(angle + half, rotated).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()

    dtype: tl.constexpr = query.dtype.element_ty
    a, b = (a * cos - b * sin).to(dtype), (b * cos + a * sin).to(dtype)
    if NEOX:
        tl.store(at + pair, a, rotated)
        tl.store(at + half + pair, b, rotated)
    else:
        tl.store(at + column, tl.reshape(tl.join(a, b), (ROWS, D)), in_pairs)


def launch(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor | None,
    head_size: int,
    cos_sin_cache: torch.Tensor,
    is_neox: bool,
    _rope_dim_offset: int = 0,
    _inverse: bool = False,
    *,
    config: dict[str, Any],
    _launcher: Callable[..., None],
) -> None:
    """One program per `tokens` tokens and as many heads as give each thread two vectors, or one of interleaved pairs."""
    keys = query if key is None else key
    query_size, key_size, rotary = query.size(1), 0 if key is None else keys.size(1), cos_sin_cache.size(1)
    if query_size % head_size != 0 or key_size % head_size != 0:
        raise ValueError(f"rotary_embedding: rows of {query_size} and {key_size} elements are not heads of {head_size}")
    if rotary % 16 != 0 or rotary > head_size:
        raise ValueError(f"rotary_embedding: {rotary} of {head_size} elements rotated; the kernel takes multiples of 16")
    tokens, heads = lib.program_tile(head_size, is_neox, config)
    query_tiles = (query_size // head_size + heads - 1) // heads
    key_tiles = (key_size // head_size + heads - 1) // heads
    pdl = config.get("pdl", True)
    _launcher(
        rotary_embedding,
        ((query.size(0) + tokens - 1) // tokens, query_tiles + key_tiles),
        query,
        keys,
        positions,
        cos_sin_cache,
        query.size(0),
        query.stride(0),
        keys.stride(0),
        query_size // head_size,
        key_size // head_size,
        query_tiles,
        rotary // 16,
        D=head_size,
        NEOX=is_neox,
        TOKENS=tokens,
        HEADS=heads,
        PDL=pdl,
        num_warps=config["num_warps"],
        num_stages=1,
        launch_pdl=pdl,
    )


def candidates(sizes: dict[str, int], _variant: Variant) -> list[dict[str, Any]]:
    """Configs worth measuring: those of the fused ops, and longer programs, which have no norm to wait for."""
    return lib.candidates(sizes) + ([{"tokens": 4, "num_warps": 4}] if sizes["M"] > 512 else [])
