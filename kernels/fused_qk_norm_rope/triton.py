"""The Triton kernel of fused_qk_norm_rope: a tile of heads of a few tokens per program, q and k in one launch."""

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
def fused_qk_norm_rope(
    qkv,
    q_weight,
    k_weight,
    cos_sin_cache,
    position_ids,
    eps,
    tokens,
    row,
    q_heads,
    k_heads,
    q_tiles,
    sixteenths,
    D: tl.constexpr,
    NEOX: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Normalizes and rotates HEADS heads of TOKENS tokens; the tiles of k follow those of q, and none has heads of both.

    sixteenths is the rotary dimension / 16: so its rows are seen to be aligned.
    """
    ROWS: tl.constexpr = TOKENS * HEADS
    half = sixteenths * 8
    rows = tl.arange(0, ROWS)
    token = tl.program_id(0) * TOKENS + rows // HEADS
    tile = tl.program_id(1)
    of_q = tile < q_tiles
    head = tl.where(of_q, tile, tile - q_tiles) * HEADS + rows % HEADS
    inside = ((token < tokens) & (head < tl.where(of_q, q_heads, k_heads)))[:, None]
    at = qkv + (token.to(tl.int64) * row + (head + tl.where(of_q, 0, q_heads)) * D)[:, None]
    weight = tl.where(of_q, q_weight, k_weight)
    pair = tl.arange(0, D // 2)[None, :]
    rotated = pair < half
    column = tl.arange(0, D)[None, :]
    # As matrices the weights get the heads' layout in registers; and they are constants, so they need not wait.
    if NEOX:
        # The pairs of the rotary dimensions, then those of the rest: each half of a head loads as vectors.
        a_at = pair + tl.where(rotated, 0, half)
        b_at = pair + tl.where(rotated, half, D // 2)
        a_weight = tl.load(weight + tl.broadcast_to(a_at, (ROWS, D // 2))).to(tl.float32)
        b_weight = tl.load(weight + tl.broadcast_to(b_at, (ROWS, D // 2))).to(tl.float32)
    else:
        weights = tl.load(weight + tl.broadcast_to(column, (ROWS, D))).to(tl.float32)

    if PDL:
        tl.extra.cuda.gdc_wait()
    # The heads before the angles: their loads do not wait for the position.
    position = tl.load(position_ids + token, token < tokens, other=0)
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

    rstd = tl.rsqrt(tl.sum(squares, 1) * (1 / D) + eps)[:, None]
    dtype: tl.constexpr = qkv.dtype.element_ty
    if NEOX:
        a *= rstd * a_weight
        b *= rstd * b_weight
    else:
        a, b = tl.split(tl.reshape(x * (rstd * weights), (ROWS, D // 2, 2)))
    a, b = (a * cos - b * sin).to(dtype), (b * cos + a * sin).to(dtype)
    if NEOX:
        tl.store(at + a_at, a, inside)
        tl.store(at + b_at, b, inside)
    else:
        tl.store(at + column, tl.reshape(tl.join(a, b), (ROWS, D)), inside)


def launch(
    qkv: torch.Tensor,
    num_heads_q: int,
    num_heads_k: int,
    num_heads_v: int,
    head_dim: int,
    eps: float,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    is_neox: bool,
    position_ids: torch.Tensor,
    _forced_token_heads_per_warp: int = -1,
    *,
    config: dict[str, Any],
    _launcher: Callable[..., None],
) -> None:
    """One program per tile of tokens and heads, as in rotary_embedding."""
    rotary, row = cos_sin_cache.size(1), qkv.size(1)
    if (num_heads_q + num_heads_k + num_heads_v) * head_dim != row or num_heads_q + num_heads_k < 1:
        raise ValueError(f"fused_qk_norm_rope: rows of {row} elements are not {num_heads_q}, {num_heads_k}, … heads")
    if q_weight.size(0) != head_dim or k_weight.size(0) != head_dim:
        raise ValueError(f"fused_qk_norm_rope: weights are {q_weight.shape} and {k_weight.shape}; heads have {head_dim}")
    if rotary % 16 != 0 or rotary > head_dim:
        raise ValueError(f"fused_qk_norm_rope: {rotary} of {head_dim} elements rotated; the kernel takes multiples of 16")
    tokens, heads = program_tile(head_dim, is_neox, config)
    q_tiles, k_tiles = (num_heads_q + heads - 1) // heads, (num_heads_k + heads - 1) // heads
    pdl = config.get("pdl", True)
    _launcher(
        fused_qk_norm_rope,
        ((qkv.size(0) + tokens - 1) // tokens, q_tiles + k_tiles),
        qkv,
        q_weight,
        k_weight,
        cos_sin_cache,
        position_ids,
        eps,
        qkv.size(0),
        row,
        num_heads_q,
        num_heads_k,
        q_tiles,
        rotary // 16,
        D=head_dim,
        NEOX=is_neox,
        TOKENS=tokens,
        HEADS=heads,
        PDL=pdl,
        num_warps=config["num_warps"],
        num_stages=1,
        launch_pdl=pdl,
    )
