"""The Triton kernel of reshape_and_cache_flash: a program takes a block of columns of K and of V of a few tokens."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from hdispatch.opspec import Variant

from ..lib.triton_launch import launch_options

GENERIC = ("N",)


@triton.jit
def stored(x, scale, like: tl.constexpr):
    """x as a cache of that dtype has it; of bytes they are those of fp8."""
    if like == tl.uint8 or like == tl.float8e4nv:
        y = tl.div_rn(x.to(tl.float32), scale).to(tl.float8e4nv)
        y = y.to(tl.uint8, bitcast=True) if like == tl.uint8 else y
    else:
        y = x
    return y


@triton.jit
def reshape_and_cache_flash(
    key, value, key_cache, value_cache, slot_mapping, k_scale, v_scale, tokens, columns, page, key_row, value_row,
    k_block, k_slot, k_head, v_block, v_slot, v_head,
    D: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """columns is heads * D."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (token < tokens)[:, None] & (column < columns)[None, :]
    if PDL:
        tl.extra.cuda.gdc_wait()
    slot = tl.load(slot_mapping + token, token < tokens, other=-1)
    k = tl.load(key + (token.to(tl.int64) * key_row)[:, None] + column[None, :], inside, other=0.0)
    v = tl.load(value + (token.to(tl.int64) * value_row)[:, None] + column[None, :], inside, other=0.0)
    like: tl.constexpr = key_cache.dtype.element_ty
    fp8: tl.constexpr = like != key.dtype.element_ty
    k_divisor = tl.load(k_scale) if fp8 else 1.0
    v_divisor = tl.load(v_scale) if fp8 else 1.0
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    # Unsigned, of 32 bits: a cheaper division.
    block = (slot.to(tl.uint32) // tl.cast(page, tl.uint32)).to(tl.int64)
    place = slot - block * page
    head, d = column // D, column % D
    k_at = (block * k_block + place * k_slot)[:, None] + (head * k_head + d)[None, :]
    v_at = (block * v_block + place * v_slot)[:, None] + (head * v_head + d)[None, :]
    here = inside & (slot >= 0)[:, None]
    tl.store(key_cache + k_at, stored(k, k_divisor, like), here)
    tl.store(value_cache + v_at, stored(v, v_divisor, like), here)


def launch(key, value, key_cache, value_cache, slot_mapping, _kv_cache_dtype, k_scale, v_scale, *, config, _launcher):
    """One program per `tokens` tokens and `block` columns."""
    tokens, heads, dim = key.shape
    columns, page = heads * dim, key_cache.size(1)
    if value_cache.size(0) != key_cache.size(0) or value_cache.size(1) != page:
        raise ValueError(
            f"reshape_and_cache_flash: caches of {key_cache.shape} and {value_cache.shape}; the kernel takes like ones"
        )
    for cache in (key_cache, value_cache):
        if cache.stride(3) != 1:
            raise ValueError(f"reshape_and_cache_flash: heads of a cache have the stride {cache.stride(3)}; the kernel takes 1")
    block = config["block"]
    grid = ((tokens + config["tokens"] - 1) // config["tokens"], (columns + block - 1) // block)
    tensors = (key, value, key_cache, value_cache, slot_mapping, k_scale, v_scale)
    strides = [cache.stride(axis) for cache in (key_cache, value_cache) for axis in range(3)]
    sizes = (tokens, columns, page, key.stride(0), value.stride(0), *strides)
    tile = {"D": dim, "TOKENS": config["tokens"], "BLOCK": block}
    _launcher(reshape_and_cache_flash, grid, *tensors, *sizes, **tile, **launch_options(config))


def candidates(sizes: dict[str, int], _variant: Variant) -> list[dict[str, Any]]:
    """Configs worth measuring."""
    tiles = [(1, 1024, 4), (1, 512, 2), (1, 256, 1)]
    if sizes["M"] > 64:
        tiles += [(2, 1024, 4), (4, 1024, 4), (2, 1024, 8)]
    return [{"tokens": tokens, "block": block, "num_warps": warps} for tokens, block, warps in tiles]
