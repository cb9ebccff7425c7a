"""The Triton kernel of fused_qk_norm_rope_cache: as fused_qk_norm_rope's, with k's tiles stored in the cache, and v's too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from ..lib.triton_rope import candidates as candidates
from ..lib.triton_rope import program_tile

GENERIC = ("K",)
INDEX_BITS = 64
EARLY_READS = ("q_weight", "k_weight")


@triton.jit
def fused_qk_norm_rope_cache(
    qkv,
    q_weight,
    k_weight,
    cos_sin_cache,
    position_ids,
    slot_mapping,
    kv_cache,
    eps,
    tokens,
    row,
    q_heads,
    k_heads,
    q_tiles,
    k_tiles,
    sixteenths,
    page,
    block_stride,
    head_stride,
    slot_stride,
    D: tl.constexpr,
    NEOX: tl.constexpr,
    NORM: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    PDL: tl.constexpr,
):
    """HEADS heads of TOKENS tokens: first the tiles of q, then those of k, then those of v, and none has heads of two.

    sixteenths is the rotary dimension / 16: so its rows are seen to be aligned.
    """
    ROWS: tl.constexpr = TOKENS * HEADS
    half = sixteenths * 8
    rows = tl.arange(0, ROWS)
    token = tl.program_id(0) * TOKENS + rows // HEADS
    tile = tl.program_id(1)
    of_q, of_v = tile < q_tiles, tile >= q_tiles + k_tiles
    before = tl.where(of_q, 0, tl.where(of_v, q_tiles + k_tiles, q_tiles))
    head = (tile - before) * HEADS + rows % HEADS
    inside = ((token < tokens) & (head < tl.where(of_q, q_heads, k_heads)))[:, None]
    in_row = head + tl.where(of_q, 0, tl.where(of_v, q_heads + k_heads, q_heads))
    at = qkv + (token.to(tl.int64) * row + in_row * D)[:, None]
    pair = tl.arange(0, D // 2)[None, :]
    column = tl.arange(0, D)[None, :]
    if of_v:
        if PDL:
            tl.extra.cuda.gdc_wait()
        slot = tl.load(slot_mapping + token, token < tokens, other=-1)
        v = tl.load(at + column, inside, other=0.0)
        if PDL:
            tl.extra.cuda.gdc_launch_dependents()
        place = places(kv_cache, slot, head, page, block_stride, head_stride, slot_stride)
        tl.store(place[:, None] + D + column, v, inside & (slot >= 0)[:, None])
        return
    rotated = pair < half
    # The pairs of the rotary dimensions, then those of the rest: each half of a head loads as vectors.
    a_at = pair + tl.where(rotated, 0, half)
    b_at = pair + tl.where(rotated, half, D // 2)
    if NORM:
        # As matrices the weights get the heads' layout in registers; and they are constants, so they need not wait.
        weight = tl.where(of_q, q_weight, k_weight)
        if NEOX:
            a_weight = tl.load(weight + tl.broadcast_to(a_at, (ROWS, D // 2))).to(tl.float32)
            b_weight = tl.load(weight + tl.broadcast_to(b_at, (ROWS, D // 2))).to(tl.float32)
        else:
            weights = tl.load(weight + tl.broadcast_to(column, (ROWS, D))).to(tl.float32)

    if PDL:
        tl.extra.cuda.gdc_wait()
    # The heads before the angles: their loads do not wait for the position.
    position = tl.load(position_ids + token, token < tokens, other=0)
    slot = tl.load(slot_mapping + token, token < tokens, other=-1)
    if NEOX:
        a = tl.load(at + a_at, inside, other=0.0).to(tl.float32)
        b = tl.load(at + b_at, inside, other=0.0).to(tl.float32)
        squares = a * a + b * b
    else:
        x = tl.load(at + column, inside, other=0.0).to(tl.float32)
        squares = x * x
    angle = cos_sin_cache + (position * (2 * half))[:, None] + pair
    cos = tl.load(angle, inside & rotated, other=1.0).to(tl.float32)
    sin = tl.load(angle + half, inside & rotated, other=0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()

    if NORM:
        rstd = tl.rsqrt(tl.sum(squares, 1) * (1 / D) + eps)[:, None]
        if NEOX:
            a *= rstd * a_weight
            b *= rstd * b_weight
        else:
            x *= rstd * weights
    dtype: tl.constexpr = qkv.dtype.element_ty
    if not NEOX:
        a, b = tl.split(tl.reshape(x, (ROWS, D // 2, 2)))
    a, b = (a * cos - b * sin).to(dtype), (b * cos + a * sin).to(dtype)
    place = places(kv_cache, slot, head, page, block_stride, head_stride, slot_stride)[:, None]
    to = tl.where(of_q, at, place)
    written = inside & (of_q | (slot >= 0)[:, None])
    if NEOX:
        tl.store(to + a_at, a, written)
        tl.store(to + b_at, b, written)
    else:
        tl.store(to + column, tl.reshape(tl.join(a, b), (ROWS, D)), written)


@triton.jit
def places(kv_cache, slot, head, page, block_stride, head_stride, slot_stride):
    """Where K of a head of the token of a slot begins; slots and heads alike [rows]."""
    # Unsigned, of 32 bits: a cheaper division.
    block = (slot.to(tl.uint32) // tl.cast(page, tl.uint32)).to(tl.int64)
    return kv_cache + block * block_stride + (slot - block * page) * slot_stride + head.to(tl.int64) * head_stride


def launch(
    qkv: torch.Tensor,
    num_heads_q: int,
    num_heads_k: int,
    head_dim: int,
    eps: float,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    cos_sin_cache: torch.Tensor,
    is_neox: bool,
    position_ids: torch.Tensor,
    slot_mapping: torch.Tensor,
    kv_cache: torch.Tensor,
    *,
    config: dict[str, Any],
    _launcher: Callable[..., None],
) -> None:
    """One program per tile of tokens and heads, as in rotary_embedding."""
    rotary, name = cos_sin_cache.size(1), "fused_qk_norm_rope_cache"
    if (num_heads_q + 2 * num_heads_k) * head_dim != qkv.size(1):
        raise ValueError(
            f"{name}: rows of {qkv.size(1)} elements are not {num_heads_q} + 2 * {num_heads_k} heads of {head_dim}"
        )
    for weight in (q_weight, k_weight):
        if weight is not None and weight.size(0) != head_dim:
            raise ValueError(f"{name}: a weight is {weight.shape}; heads have {head_dim}")
    if rotary % 16 != 0 or rotary > head_dim:
        raise ValueError(f"{name}: {rotary} of {head_dim} elements rotated; the kernel takes multiples of 16")
    if kv_cache.size(1) != num_heads_k or kv_cache.size(3) != 2 * head_dim or kv_cache.stride(3) != 1:
        raise ValueError(f"{name}: a cache of {kv_cache.shape}, the last stride {kv_cache.stride(3)}; heads have {head_dim}")
    tokens, heads = program_tile(head_dim, is_neox, config)
    q_tiles, k_tiles = (num_heads_q + heads - 1) // heads, (num_heads_k + heads - 1) // heads
    pdl = config.get("pdl", True)
    _launcher(
        fused_qk_norm_rope_cache,
        ((qkv.size(0) + tokens - 1) // tokens, q_tiles + 2 * k_tiles),
        qkv,
        q_weight,
        k_weight,
        cos_sin_cache,
        position_ids,
        slot_mapping,
        kv_cache,
        eps,
        qkv.size(0),
        qkv.stride(0),
        num_heads_q,
        num_heads_k,
        q_tiles,
        k_tiles,
        rotary // 16,
        kv_cache.size(2),
        kv_cache.stride(0),
        kv_cache.stride(1),
        kv_cache.stride(2),
        D=head_dim,
        NEOX=is_neox,
        NORM=q_weight is not None,
        TOKENS=tokens,
        HEADS=heads,
        PDL=pdl,
        num_warps=config["num_warps"],
        num_stages=1,
        launch_pdl=pdl,
    )
