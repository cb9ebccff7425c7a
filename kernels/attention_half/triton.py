"""The Triton kernel of attention_half: a block norms and rotates its own query rows and takes the new token from registers."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from hdispatch.opspec import Variant

from ..lib import attention as lib
from ..lib.attention import blocks_of, finish, places_of, prefetch, split_tokens, tokens_of_split
from ..lib.triton_rope import check_rotary
from ..lib.triton_softmax import INTERPRETED, LOG2E

GENERIC = ("N",)
LAUNCHED = ("chunk",)
# All but qkv, which the kernel before this one writes: no kernel of a step writes the others, and of its launches only this one
# writes this layer's cache.
EARLY_READS = (
    "q_weight",
    "k_weight",
    "cos_sin_cache",
    "positions",
    "slot_mapping",
    "kv_cache",
    "block_table",
    "seq_lens",
)


@triton.jit
def partners(half, D: tl.constexpr):
    """For the elements [D] of a head: how far the other element of its pair is, and whether it is the pair's first.

    NeoX: elements i and i + half for i < half; the rest have pairs too, for the sum of squares. Steps are the same for 8
    elements in a row, so that what is loaded with them are vectors.
    """
    d = tl.arange(0, D)
    rest = D // 2 - half
    low, rotated, rest_low = d < half, d < 2 * half, d < 2 * half + rest
    step = tl.where(low, half, tl.where(rotated, -half, tl.where(rest_low, rest, -rest)))
    return step, low | (~rotated & rest_low)


@triton.jit
def turned(x, y, x_weight, y_weight, first, cos, sin, eps, D: tl.constexpr, NORM: tl.constexpr):
    """Heads x [rows, D] in float32 after RMS norm and rotation; y has of each element the other one of its pair.

    The operations and their order are those of fused_qk_norm_rope, whose threads add the squares of each pair first: here
    every sum has what is added there, twice.
    """
    if NORM:
        a, b = tl.where(first, x, y), tl.where(first, y, x)
        rstd = tl.rsqrt(tl.sum(a * a + b * b, 1) * (0.5 / D) + eps)[:, None]
        x, y = x * (rstd * x_weight), y * (rstd * y_weight)
    return tl.where(first, x * cos - y * sin, x * cos + y * sin)


@triton.jit
def attention_half(
    out, qkv, q_weight, k_weight, cos_sin_cache, positions, slot_mapping, kv_cache, block_table, seq_lens, workspace,
    max_seq_len, scale, eps, chunk, page, inverse, sixteenths, out_row, qkv_row, table_row, block_stride, head_stride,
    slot_stride,
    G: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, NORM: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
    FORM: tl.constexpr, WARPS: tl.constexpr, AXIS: tl.constexpr, HELD: tl.constexpr, AT_ONCE: tl.constexpr, EARLY: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Grid as kernels/lib/attention.py says. The cache's tokens are split; the new one belongs to the last split that is used.

    Of ROWS rows the first G are query heads, and the next one is k, which costs nothing there. sixteenths: of the rotary
    dimension, so that its rows are seen to be aligned. EARLY: all but qkv is read, and the first tile is brought to L2, before
    the wait.
    """
    split = tl.program_id(AXIS)
    head = tl.program_id(1 - AXIS)
    request = tl.program_id(2)
    heads = tl.num_programs(1 - AXIS)
    half = sixteenths * 8
    if PDL and not EARLY:
        tl.extra.cuda.gdc_wait()
    old = tl.load(seq_lens + request) - 1
    position = tl.load(positions + request)
    slot = tl.load(slot_mapping + request)
    size = split_tokens(max_seq_len - 1, chunk, AXIS)
    used = tl.minimum(tl.maximum(tl.cdiv(old, size), 1), tl.num_programs(AXIS))
    if split >= used:
        # A block that ends without waiting would let the next kernel's wait end before the kernels before this one have.
        if PDL and EARLY:
            tl.extra.cuda.gdc_wait()
        return
    is_last = split == used - 1
    begin = split * size
    end = tl.where(split == tl.num_programs(AXIS) - 1, old, tl.minimum(begin + size, old))
    cache = kv_cache + head.to(tl.int64) * head_stride
    table = block_table + request.to(tl.int64) * table_row
    token = begin + tl.arange(0, TILE)
    coming = blocks_of(table, token, end, inverse)
    if EARLY:
        prefetch(cache, places_of(coming, token, page, inverse, block_stride, slot_stride), D)

    row = tl.arange(0, ROWS)
    d = tl.arange(0, D)
    own = tl.broadcast_to(d[None, :], (ROWS, D))
    step, first = partners(half, D)
    # 8 in a row follow each other from a multiple of 8 on, which Triton 3.9 no longer sees of what `tl.where` chose.
    other, first = tl.max_contiguous(tl.multiple_of(own + step[None, :], (1, 8)), (1, 8)), first[None, :]
    # As matrices, here too, the constants get the heads' layout in registers.
    x_weight, y_weight = 1.0, 1.0
    if NORM:
        weight = tl.where(row < G, q_weight, k_weight)[:, None]
        x_weight, y_weight = tl.load(weight + own).to(tl.float32), tl.load(weight + other).to(tl.float32)
    rotated = own < 2 * half
    pair = tl.max_contiguous(tl.multiple_of(tl.where(d < half, 0, -half)[None, :] + own, (1, 8)), (1, 8))
    angle = cos_sin_cache + position * (2 * half) + pair
    cos = tl.load(angle, rotated, other=1.0).to(tl.float32)
    sin = tl.load(angle + half, rotated, other=0.0).to(tl.float32)
    if PDL and EARLY:
        tl.extra.cuda.gdc_wait()

    line = qkv + request.to(tl.int64) * qkv_row
    heads_at = line + (tl.where(row < G, head * G + row, heads * G + head) * D)[:, None]
    here = (row <= G)[:, None]
    x = tl.load(heads_at + own, here, other=0.0).to(tl.float32)
    y = tl.load(heads_at + other, here, other=0.0).to(tl.float32)
    v_new = tl.load(line + (heads * (G + 1) + head) * D + d)
    dtype: tl.constexpr = qkv.dtype.element_ty
    work: tl.constexpr = tl.float32 if INTERPRETED else dtype
    x = turned(x, y, x_weight, y_weight, first, cos, sin, eps, D, NORM).to(dtype)

    writes = is_last & (slot >= 0)
    # Unsigned, of 32 bits: a cheaper division.
    block = (slot.to(tl.uint32) // tl.cast(page, tl.uint32)).to(tl.int64)
    place = cache + block * block_stride + (slot - block * page) * slot_stride
    tl.store(place + own, x, ((row == G) & writes)[:, None])
    tl.store(place + D + d, v_new, (d < D) & writes)

    scale_log2 = scale * LOG2E
    x = x.to(work)
    scores = tl.sum(tl.where(row[None, :] == G, tl.dot(x, tl.trans(x)), 0.0), 1) * scale_log2
    m = tl.where(is_last, scores, float("-inf"))
    total = tl.where(is_last, tl.full([ROWS], 1.0, tl.float32), 0.0)
    acc = tl.zeros([ROWS, D], tl.float32) + tl.where(is_last, v_new.to(tl.float32), 0.0)[None, :]
    m, total, acc = tokens_of_split(
        x, m, total, acc, cache, table, coming, begin, end, row, 0, scale_log2, 0.0, page, inverse, block_stride, slot_stride,
        D, TILE, STAGES, FORM, WARPS, False, False, False,
    )  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    finish(out, out_row, workspace, used, m, total, acc, 1.0, 1, heads, G, D, triton.next_power_of_2(G), HELD, AT_ONCE, AXIS)


def launch(
    out, qkv, q_weight, k_weight, cos_sin_cache, positions, slot_mapping, kv_cache, block_table, seq_lens, max_seq_len,
    scale, eps, group, _is_neox, workspace, *, config, _launcher,
):  # fmt: skip
    """A block per split, kv head and request; see lib.split_chunk for config["chunk"]."""
    requests, heads, dim = out.shape
    kv_heads, page = kv_cache.size(1), kv_cache.size(2)
    lib.check_cache("attention_half", kv_cache, heads, group, max_seq_len)
    if qkv.size(1) != (heads + 2 * kv_heads) * dim:
        raise ValueError(f"attention_half: rows of {qkv.size(1)} elements are not {heads} + 2 * {kv_heads} heads of {dim}")
    if qkv.stride(0) % 16 != 0:
        raise ValueError(f"attention_half: rows of qkv are {qkv.stride(0)} elements apart; the kernel takes multiples of 16")
    sixteenths = check_rotary("attention_half", cos_sin_cache, dim)
    chunk = lib.split_chunk(config["chunk"], group)
    grid = lib.grid_of(config, lib.splits_of(max_seq_len - 1, requests * kv_heads, group, chunk), kv_heads, requests)
    constants = (q_weight, k_weight, cos_sin_cache, positions, slot_mapping)
    tensors = (out, qkv, *constants, kv_cache, block_table, seq_lens, workspace.view(torch.float32))
    sizes = (chunk, page, lib.page_inverse(page), sixteenths)
    strides = (out.stride(0), qkv.stride(0), *lib.cache_strides(kv_cache, block_table))
    tile = {"G": group, "D": dim, "ROWS": 16 if group < 16 else 32, "NORM": q_weight is not None}
    options = lib.options(config, group, dim) | {"EARLY": config.get("early", True)}
    _launcher(attention_half, grid, *tensors, max_seq_len, scale, eps, *sizes, *strides, **tile, **options)


def candidates(sizes: dict[str, int], variant: Variant) -> list[dict[str, Any]]:
    """Configs worth measuring."""
    group = int(variant.static["group"])
    return lib.candidates(sizes, group, group)
