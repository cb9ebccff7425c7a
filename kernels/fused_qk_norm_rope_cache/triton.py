"""The Triton kernel of fused_qk_norm_rope_cache: as fused_qk_norm_rope's, with k's tiles stored in the cache, and v's too."""

from __future__ import annotations

import triton
import triton.language as tl

from ..lib import triton_rope as lib
from ..lib.triton_rope import candidates as candidates

GENERIC = ("K",)
EARLY_READS = ("q_weight", "k_weight")


@triton.jit
def fused_qk_norm_rope_cache(
    qkv, q_weight, k_weight, cos_sin_cache, position_ids, slot_mapping, kv_cache, eps, tokens, row, q_heads, k_heads,
    q_tiles, k_tiles, sixteenths, page, block_stride, head_stride, slot_stride,
    D: tl.constexpr, NEOX: tl.constexpr, NORM: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """HEADS heads of TOKENS tokens: first the tiles of q, then those of k, then those of v, and none has heads of two."""
    half = sixteenths * 8
    token, number = lib.rows_of_tile(TOKENS, HEADS)
    tile = tl.program_id(1)
    of_q, of_v = tile < q_tiles, tile >= q_tiles + k_tiles
    before = tl.where(of_q, 0, tl.where(of_v, q_tiles + k_tiles, q_tiles))
    head = (tile - before) * HEADS + number
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
    a_at, b_at, rotated = lib.halves(pair, half, D)
    if NORM:
        # The weights are constants, so they need not wait.
        weight = tl.where(of_q, q_weight, k_weight)
        a_weight, b_weight = lib.load_weights(weight, a_at, b_at, column, TOKENS * HEADS, D, NEOX)

    if PDL:
        tl.extra.cuda.gdc_wait()
    # The heads before the angles: their loads do not wait for the position.
    position = tl.load(position_ids + token, token < tokens, other=0)
    slot = tl.load(slot_mapping + token, token < tokens, other=-1)
    a, b, squares = lib.load_heads(at, a_at, b_at, column, inside, NEOX)
    cos, sin = lib.load_angles(cos_sin_cache, position, pair, half, inside, rotated)
    place = places(kv_cache, slot, head, page, block_stride, head_stride, slot_stride)[:, None]
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()

    if NORM:
        a, b = lib.normed(a, b, a_weight, b_weight, squares, eps, D, NEOX)
    a, b = lib.turned(a, b, cos, sin, qkv.dtype.element_ty, D, NEOX)
    # A program does one of the two. Of an address that `tl.where` chose Triton 3.9 no longer sees how it is aligned.
    lib.store_heads(at, a_at, b_at, column, a, b, inside & of_q, D, NEOX)
    lib.store_heads(place, a_at, b_at, column, a, b, inside & ~of_q & (slot >= 0)[:, None], D, NEOX)


@triton.jit
def places(kv_cache, slot, head, page, block_stride, head_stride, slot_stride):
    """Where K of a head of the token of a slot begins; slots and heads alike [rows]."""
    # Unsigned, of 32 bits: a cheaper division.
    block = (slot.to(tl.uint32) // tl.cast(page, tl.uint32)).to(tl.int64)
    return kv_cache + block * block_stride + (slot - block * page) * slot_stride + head.to(tl.int64) * head_stride


def launch(
    qkv, num_heads_q, num_heads_k, head_dim, eps, q_weight, k_weight, cos_sin_cache, is_neox, position_ids, slot_mapping,
    kv_cache, *, config, _launcher,
):  # fmt: skip
    """One program per tile of tokens and heads, as in rotary_embedding."""
    name = "fused_qk_norm_rope_cache"
    if (num_heads_q + 2 * num_heads_k) * head_dim != qkv.size(1):
        raise ValueError(
            f"{name}: rows of {qkv.size(1)} elements are not {num_heads_q} + 2 * {num_heads_k} heads of {head_dim}"
        )
    for weight in (q_weight, k_weight):
        if weight is not None and weight.size(0) != head_dim:
            raise ValueError(f"{name}: a weight is {weight.shape}; heads have {head_dim}")
    sixteenths = lib.check_rotary(name, cos_sin_cache, head_dim)
    if kv_cache.size(1) != num_heads_k or kv_cache.size(3) != 2 * head_dim or kv_cache.stride(3) != 1:
        raise ValueError(f"{name}: a cache of {kv_cache.shape}, the last stride {kv_cache.stride(3)}; heads have {head_dim}")
    grid, tiles = lib.tiles(qkv.size(0), (num_heads_q, num_heads_k, num_heads_k), head_dim, is_neox, config)
    tensors = (qkv, q_weight, k_weight, cos_sin_cache, position_ids, slot_mapping, kv_cache)
    sizes = (qkv.size(0), qkv.stride(0), num_heads_q, num_heads_k, *tiles[:2], sixteenths, kv_cache.size(2))
    strides = (kv_cache.stride(0), kv_cache.stride(1), kv_cache.stride(2))
    options = lib.options(head_dim, is_neox, config)
    _launcher(fused_qk_norm_rope_cache, grid, *tensors, eps, *sizes, *strides, NORM=q_weight is not None, **options)
