"""What the Triton kernels of the ops with a rotary embedding share: a program takes a tile of heads of a few tokens.

A tile has rows, of which each is a head of a token, [ROWS, D]. Of pairs that are the halves of a head (NEOX) it is two tensors
[ROWS, D / 2] from the start on, and its loads are vectors; of interleaved ones it is one tensor until they are rotated.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from hdispatch.opspec import Variant

from .triton_launch import launch_options


@triton.jit
def rows_of_tile(TOKENS: tl.constexpr, HEADS: tl.constexpr):
    """Of each row of the program's tile its token, and its head's number in the tile."""
    rows = tl.arange(0, TOKENS * HEADS)
    return tl.program_id(0) * TOKENS + rows // HEADS, rows % HEADS


@triton.jit
def heads_of_tile(tokens, first_tiles, first_heads, second_heads, TOKENS: tl.constexpr, HEADS: tl.constexpr):
    """Of a program whose tiles of the first tensor's heads come before the second's: whether it has the first's, and of each
    row its token, its head, and whether there is such a one, [rows, 1].
    """
    token, number = rows_of_tile(TOKENS, HEADS)
    tile = tl.program_id(1)
    of_first = tile < first_tiles
    head = tl.where(of_first, tile, tile - first_tiles) * HEADS + number
    inside = ((token < tokens) & (head < tl.where(of_first, first_heads, second_heads)))[:, None]
    return of_first, token, head, inside


@triton.jit
def halves(pair, half, D: tl.constexpr):
    """Where the two elements of each `pair`, 0 to D / 2, are in a head, and whether it is rotated, [1, D / 2]; NEOX.

    The pairs of the rotary dimensions, 2 * half, come first, then those of the rest: each half of a head loads as vectors.
    """
    rotated = pair < half
    a_at, b_at = pair + tl.where(rotated, 0, half), pair + tl.where(rotated, half, D // 2)
    # 8 in a row follow each other from a multiple of 8 on, which Triton 3.9 no longer sees of what `tl.where` chose.
    a_at = tl.max_contiguous(tl.multiple_of(a_at, (1, 8)), (1, 8))
    b_at = tl.max_contiguous(tl.multiple_of(b_at, (1, 8)), (1, 8))
    return a_at, b_at, rotated


@triton.jit
def load_weights(weight, a_at, b_at, column, ROWS: tl.constexpr, D: tl.constexpr, NEOX: tl.constexpr):
    """The weights of the elements of pairs, or twice those of whole heads. As matrices they get the heads' layout."""
    if NEOX:
        a = tl.load(weight + tl.broadcast_to(a_at, (ROWS, D // 2))).to(tl.float32)
        b = tl.load(weight + tl.broadcast_to(b_at, (ROWS, D // 2))).to(tl.float32)
    else:
        a = tl.load(weight + tl.broadcast_to(column, (ROWS, D))).to(tl.float32)
        b = a
    return a, b


@triton.jit
def load_heads(at, a_at, b_at, column, inside, NEOX: tl.constexpr):
    """The elements of pairs, or twice whole heads, in float32; and squares that add up to those of a head."""
    if NEOX:
        a = tl.load(at + a_at, inside, other=0.0).to(tl.float32)
        b = tl.load(at + b_at, inside, other=0.0).to(tl.float32)
        squares = a * a + b * b
    else:
        a = tl.load(at + column, inside, other=0.0).to(tl.float32)
        b = a
        squares = a * a
    return a, b, squares


@triton.jit
def load_angles(cos_sin_cache, position, pair, half, inside, rotated):
    """Cosines and sines of the positions' angles in float32, 1 and 0 for pairs that are not rotated."""
    angle = cos_sin_cache + (position * (2 * half))[:, None] + pair
    cos = tl.load(angle, inside & rotated, other=1.0).to(tl.float32)
    sin = tl.load(angle + half, inside & rotated, other=0.0).to(tl.float32)
    return cos, sin


@triton.jit
def normed(a, b, a_weight, b_weight, squares, eps, D: tl.constexpr, NEOX: tl.constexpr):
    """The heads of `load_heads` after an RMS norm."""
    rstd = tl.rsqrt(tl.sum(squares, 1) * (1 / D) + eps)[:, None]
    a *= rstd * a_weight
    if NEOX:
        b *= rstd * b_weight
    return a, b


@triton.jit
def turned(a, b, cos, sin, dtype: tl.constexpr, D: tl.constexpr, NEOX: tl.constexpr):
    """The heads of `load_heads` rotated, as the elements of pairs, in dtype."""
    if not NEOX:
        a, b = tl.split(tl.reshape(a, (a.shape[0], D // 2, 2)))
    return (a * cos - b * sin).to(dtype), (b * cos + a * sin).to(dtype)


@triton.jit
def store_heads(to, a_at, b_at, column, a, b, inside, D: tl.constexpr, NEOX: tl.constexpr):
    """Stores what `turned` returns."""
    if NEOX:
        tl.store(to + a_at, a, inside)
        tl.store(to + b_at, b, inside)
    else:
        tl.store(to + column, tl.reshape(tl.join(a, b), (a.shape[0], D)), inside)


def check_rotary(op: str, cos_sin_cache: torch.Tensor, head_dim: int) -> int:
    """Sixteenths of the rotary dimension, which make rows be seen as aligned. ValueError for what the kernels do not take."""
    rotary = cos_sin_cache.size(1)
    if rotary % 16 != 0 or rotary > head_dim:
        raise ValueError(f"{op}: {rotary} of {head_dim} elements rotated; the kernel takes multiples of 16")
    return rotary // 16


def tiles(
    tokens: Any, heads: tuple[Any, ...], head_dim: int, is_neox: bool, config: dict[str, Any]
) -> tuple[tuple[Any, Any], list[Any]]:
    """The grid, and how many tiles each of the groups of `heads` has, one after the other: none has heads of two."""
    of_tokens, of_heads = program_tile(head_dim, is_neox, config)
    counts = [(count + of_heads - 1) // of_heads for count in heads]
    return ((tokens + of_tokens - 1) // of_tokens, sum(counts)), counts


def options(head_dim: int, is_neox: bool, config: dict[str, Any]) -> dict[str, Any]:
    """The kernels' constants and launch options."""
    tokens, heads = program_tile(head_dim, is_neox, config)
    return {"D": head_dim, "NEOX": is_neox, "TOKENS": tokens, "HEADS": heads, **launch_options(config)}


def program_tile(head_size: int, is_neox: bool, config: dict[str, Any]) -> tuple[int, int]:
    """Tokens and heads of a program for which loads are vectors of 16 bytes and nothing is exchanged between threads.

    A thread holds the two elements of 8 pairs, of one head of each token. Of interleaved pairs it holds 4: their halves
    of the cache are vectors of 8 bytes, and for more than one token the compiler would make them 16 and exchange them.
    """
    pairs, tokens = (8, config["tokens"]) if is_neox else (4, 1)
    return tokens, config["num_warps"] * 32 * pairs * 2 // head_size


def candidates(sizes: dict[str, int], _variant: Variant | None = None) -> list[dict[str, Any]]:
    """Configs worth measuring. More tokens per program give a thread more loads at once, and longer programs."""
    if sizes["M"] <= 64:
        tiles = [(1, 2), (1, 4), (1, 1), (1, 8), (2, 2)]
    elif sizes["M"] <= 512:
        tiles = [(1, 2), (1, 4), (1, 1), (1, 8), (2, 1), (2, 2), (2, 4)]
    else:
        tiles = [(2, 2), (1, 2), (1, 4), (2, 1), (2, 4), (4, 1), (4, 2)]
    return [{"tokens": tokens, "num_warps": warps} for tokens, warps in tiles]
