"""The Triton kernel of fused_qk_norm_rope: a tile of heads of a few tokens per program, q and k in one launch."""

from __future__ import annotations

import triton
import triton.language as tl

from ..lib import triton_rope as lib
from ..lib.triton_rope import candidates as candidates

GENERIC = ("K",)
EARLY_READS = ("q_weight", "k_weight")


@triton.jit
def fused_qk_norm_rope(
    qkv, q_weight, k_weight, cos_sin_cache, position_ids, eps, tokens, row, q_heads, k_heads, q_tiles, sixteenths,
    D: tl.constexpr, NEOX: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Normalizes and rotates HEADS heads of TOKENS tokens; the tiles of k follow those of q, and none has heads of both."""
    half = sixteenths * 8
    of_q, token, head, inside = lib.heads_of_tile(tokens, q_tiles, q_heads, k_heads, TOKENS, HEADS)
    at = qkv + (token.to(tl.int64) * row + (head + tl.where(of_q, 0, q_heads)) * D)[:, None]
    pair = tl.arange(0, D // 2)[None, :]
    column = tl.arange(0, D)[None, :]
    a_at, b_at, rotated = lib.halves(pair, half, D)
    # The weights are constants, so they need not wait.
    a_weight, b_weight = lib.load_weights(tl.where(of_q, q_weight, k_weight), a_at, b_at, column, TOKENS * HEADS, D, NEOX)

    if PDL:
        tl.extra.cuda.gdc_wait()
    # The heads before the angles: their loads do not wait for the position.
    position = tl.load(position_ids + token, token < tokens, other=0)
    a, b, squares = lib.load_heads(at, a_at, b_at, column, inside, NEOX)
    cos, sin = lib.load_angles(cos_sin_cache, position, pair, half, inside, rotated)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()

    a, b = lib.normed(a, b, a_weight, b_weight, squares, eps, D, NEOX)
    a, b = lib.turned(a, b, cos, sin, qkv.dtype.element_ty, D, NEOX)
    lib.store_heads(at, a_at, b_at, column, a, b, inside, D, NEOX)


def launch(
    qkv, num_heads_q, num_heads_k, num_heads_v, head_dim, eps, q_weight, k_weight, cos_sin_cache, is_neox, position_ids,
    _forced_token_heads_per_warp=-1, *, config, _launcher,
):  # fmt: skip
    """One program per tile of tokens and heads, as in rotary_embedding."""
    row = qkv.size(1)
    if (num_heads_q + num_heads_k + num_heads_v) * head_dim != row or num_heads_q + num_heads_k < 1:
        raise ValueError(f"fused_qk_norm_rope: rows of {row} elements are not {num_heads_q}, {num_heads_k}, … heads")
    if q_weight.size(0) != head_dim or k_weight.size(0) != head_dim:
        raise ValueError(f"fused_qk_norm_rope: weights are {q_weight.shape} and {k_weight.shape}; heads have {head_dim}")
    sixteenths = lib.check_rotary("fused_qk_norm_rope", cos_sin_cache, head_dim)
    grid, tiles = lib.tiles(qkv.size(0), (num_heads_q, num_heads_k), head_dim, is_neox, config)
    tensors = (qkv, q_weight, k_weight, cos_sin_cache, position_ids)
    sizes = (qkv.size(0), row, num_heads_q, num_heads_k, tiles[0], sixteenths)
    _launcher(fused_qk_norm_rope, grid, *tensors, eps, *sizes, **lib.options(head_dim, is_neox, config))
