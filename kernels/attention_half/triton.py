"""The Triton kernel of attention_half: a block norms and rotates its own query rows and takes the new token from registers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from hdispatch.opspec import Variant

from ..lib import attention as lib
from ..lib.attention import INTERPRETED, LOG2E, blocks_of, finish, places_of, prefetch, split_tokens, tokens_of_split
from ..lib.workspace import workspace_floats

GENERIC = ("N",)
INDEX_BITS = 64
# What is read before the wait: lengths and blocks, which no kernel of a step writes, and into L2 the cache, of which no other
# launch of a step writes this layer's.
EARLY_READS = ("block_table", "seq_lens", "kv_cache")


@triton.jit
def turned_heads(at, weight, cos_sin, half, eps, here, D: tl.constexpr, NORM: tl.constexpr):
    """Heads at `at` [rows] as [rows, D] float32: RMS norm with the weights at weight [rows], then NeoX rotation.

    cos_sin points to half cosines, then half sines. The operations and their order are those of fused_qk_norm_rope: of each
    element its pair is loaded too, the squares of pairs are added first, so that every sum has what that kernel's has, twice.
    """
    d = tl.arange(0, D)
    low = d < half
    rotated = d < 2 * half
    # Beside the rotary dimensions any partner will do; there are pairs of the rest for the sum of squares.
    rest = D // 2 - half
    other = tl.where(low, d + half, tl.where(rotated, d - half, tl.where(d < 2 * half + rest, d + rest, d - rest)))
    first = (low | ((d >= 2 * half) & (d < 2 * half + rest)))[None, :]
    x = tl.load(at[:, None] + d[None, :], here[:, None], other=0.0).to(tl.float32)
    y = tl.load(at[:, None] + other[None, :], here[:, None], other=0.0).to(tl.float32)
    angle = tl.where(low, d, d - half)
    cos = tl.load(cos_sin + angle, rotated, other=1.0).to(tl.float32)[None, :]
    sin = tl.load(cos_sin + half + angle, rotated, other=0.0).to(tl.float32)[None, :]
    a, b = tl.where(first, x, y), tl.where(first, y, x)
    if NORM:
        rstd = tl.rsqrt(tl.sum(a * a + b * b, 1) * (0.5 / D) + eps)[:, None]
        x_weight = tl.load(weight[:, None] + d[None, :], here[:, None], other=0.0).to(tl.float32)
        y_weight = tl.load(weight[:, None] + other[None, :], here[:, None], other=0.0).to(tl.float32)
        x, y = x * (rstd * x_weight), y * (rstd * y_weight)
    return tl.where(low[None, :], x * cos - y * sin, x * cos + y * sin)


@triton.jit
def attention_half(
    out,
    qkv,
    q_weight,
    k_weight,
    cos_sin_cache,
    positions,
    slot_mapping,
    kv_cache,
    block_table,
    seq_lens,
    workspace,
    max_seq_len,
    scale,
    eps,
    chunk,
    page,
    inverse,
    eighths,
    out_row,
    qkv_row,
    table_row,
    block_stride,
    head_stride,
    slot_stride,
    G: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    NORM: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
    AT_ONCE: tl.constexpr,
    EARLY: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (splits, kv heads, requests). The cache's tokens are split; the new one belongs to the last split that is used.

    Of ROWS rows the first G are query heads, and the next one is k, which costs nothing there. eighths is half of the rotary
    dimension / 8: so its rows are seen to be aligned. EARLY: lengths and blocks are read and the first tile is brought to
    L2 before the wait.
    """
    split = tl.program_id(0)
    head = tl.program_id(1)
    request = tl.program_id(2)
    heads = tl.num_programs(1)
    half = eighths * 8
    if PDL and not EARLY:
        tl.extra.cuda.gdc_wait()
    old = tl.load(seq_lens + request) - 1
    size = split_tokens(max_seq_len - 1, chunk)
    used = tl.minimum(tl.maximum(tl.cdiv(old, size), 1), tl.num_programs(0))
    if split >= used:
        # A block that ends without waiting would let the next kernel's wait end before the kernels before this one have.
        if PDL and EARLY:
            tl.extra.cuda.gdc_wait()
        return
    is_last = split == used - 1
    begin = split * size
    end = tl.where(split == tl.num_programs(0) - 1, old, tl.minimum(begin + size, old))
    cache = kv_cache + head.to(tl.int64) * head_stride
    table = block_table + request.to(tl.int64) * table_row
    token = begin + tl.arange(0, TILE)
    coming = blocks_of(table, token, end, inverse)
    if EARLY:
        prefetch(cache, places_of(coming, token, page, inverse, block_stride, slot_stride), D)
        if PDL:
            tl.extra.cuda.gdc_wait()

    row = tl.arange(0, ROWS)
    d = tl.arange(0, D)
    dtype: tl.constexpr = qkv.dtype.element_ty
    work: tl.constexpr = tl.float32 if INTERPRETED else dtype
    line = qkv + request.to(tl.int64) * qkv_row
    position = tl.load(positions + request)
    slot = tl.load(slot_mapping + request)
    v_new = tl.load(line + (heads * (G + 1) + head) * D + d)
    at = line + tl.where(row < G, head * G + row, heads * G + head) * D
    if NORM:
        weight = tl.where(row < G, q_weight, k_weight)
    else:
        weight = at
    x = turned_heads(at, weight, cos_sin_cache + position * (2 * half), half, eps, row <= G, D, NORM).to(dtype)

    writes = is_last & (slot >= 0)
    # Unsigned, of 32 bits: a cheaper division.
    block = (slot.to(tl.uint32) // tl.cast(page, tl.uint32)).to(tl.int64)
    place = cache + block * block_stride + (slot - block * page) * slot_stride
    tl.store(place + tl.broadcast_to(d[None, :], (ROWS, D)), x, ((row == G) & writes)[:, None])
    tl.store(place + D + d, v_new, (d < D) & writes)

    scale_log2 = scale * LOG2E
    x = x.to(work)
    scores = tl.sum(tl.where(row[None, :] == G, tl.dot(x, tl.trans(x)), 0.0), 1) * scale_log2
    m = tl.where(is_last, scores, float("-inf"))
    l = tl.where(is_last, tl.full([ROWS], 1.0, tl.float32), 0.0)
    acc = tl.zeros([ROWS, D], tl.float32) + tl.where(is_last, v_new.to(tl.float32), 0.0)[None, :]
    m, l, acc = tokens_of_split(
        x, m, l, acc, cache, table, coming, begin, end, row, 0, scale_log2, 0.0, page, inverse, block_stride, slot_stride,
        D, TILE, STAGES, False, False, False,
    )  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    finish(out, out_row, workspace, used, m, l, acc, 1.0, 1, G, D, AT_ONCE)


def launch(
    out: torch.Tensor,
    qkv: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    cos_sin_cache: torch.Tensor,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    workspace: torch.Tensor,
    max_seq_len: int,
    scale: float,
    eps: float,
    group: int,
    _is_neox: bool,
    *,
    config: dict[str, Any],
    _launcher: Callable[..., None],
) -> None:
    """A block per split, kv head and request; splits of config["chunk"] tokens."""
    requests, heads, dim = out.shape
    kv_heads, page, rotary = kv_cache.size(1), kv_cache.size(2), cos_sin_cache.size(1)
    lib.check_cache("attention_half", kv_cache, heads, group, max_seq_len)
    if qkv.size(1) != (heads + 2 * kv_heads) * dim:
        raise ValueError(f"attention_half: rows of {qkv.size(1)} elements are not {heads} + 2 * {kv_heads} heads of {dim}")
    if rotary % 16 != 0 or rotary > dim:
        raise ValueError(f"attention_half: {rotary} of {dim} elements rotated; the kernel takes multiples of 16")
    if workspace.size(0) < workspace_floats(dim):
        raise ValueError(f"attention_half: the workspace has {workspace.size(0)} elements; expected {workspace_floats(dim)}")
    pdl, warps = config.get("pdl", True), config["num_warps"]
    _launcher(
        attention_half,
        (lib.splits_of(max_seq_len - 1, requests * kv_heads, group, config["chunk"]), kv_heads, requests),
        out,
        qkv,
        q_weight,
        k_weight,
        cos_sin_cache,
        positions,
        slot_mapping,
        kv_cache,
        block_table,
        seq_lens,
        workspace,
        max_seq_len,
        scale,
        eps,
        config["chunk"],
        page,
        lib.page_inverse(page),
        rotary // 16,
        out.stride(0),
        qkv.stride(0),
        block_table.stride(0),
        kv_cache.stride(0),
        kv_cache.stride(1),
        kv_cache.stride(2),
        G=group,
        D=dim,
        ROWS=16 if group < 16 else 32,
        NORM=q_weight is not None,
        TILE=config["tile"],
        STAGES=config["stages"],
        AT_ONCE=lib.rows_at_once(group, dim, warps),
        EARLY=config.get("early", True),
        PDL=pdl,
        num_warps=warps,
        launch_pdl=pdl,
    )


def candidates(sizes: dict[str, int], _variant: Variant) -> list[dict[str, Any]]:
    """Configs worth measuring."""
    dim = sizes["K"]
    tiles = [(64, 4, 3), (32, 4, 4), (64, 4, 2), (128, 4, 2), (128, 8, 3)] if dim < 256 else [(32, 4, 3), (64, 8, 2), (32, 4, 2)]
    return [{"tile": tile, "num_warps": warps, "stages": stages, "chunk": 256} for tile, warps, stages in tiles]
