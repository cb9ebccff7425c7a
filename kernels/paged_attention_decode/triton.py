"""The Triton kernel of paged_attention_decode: kernels/lib/attention.py with queries from memory."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from hdispatch.opspec import Variant

from ..lib import attention as lib
from ..lib.attention import blocks_of, finish, split_tokens, tokens_of_split
from ..lib.triton_softmax import INTERPRETED, LOG2E

GENERIC = ("N",)
LAUNCHED = ("chunk",)
# What no kernel of a step writes.
EARLY_READS = ("block_table", "seq_lens", "sinks")


@triton.jit
def paged_attention_decode(
    out, q, kv_cache, block_table, seq_lens, sinks, workspace, max_seq_len, scale, softcap, window, k_scale, v_scale,
    queries, kv_heads, chunk, page, inverse, out_row, q_row, q_query, q_head, table_row, block_stride, head_stride,
    slot_stride,
    G: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, PADDED: tl.constexpr, CAUSAL: tl.constexpr, SINKS: tl.constexpr,
    TILE: tl.constexpr, STAGES: tl.constexpr, FORM: tl.constexpr, WARPS: tl.constexpr, AXIS: tl.constexpr, HELD: tl.constexpr,
    AT_ONCE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid as kernels/lib/attention.py says. Of ROWS rows the first queries * G, at most PADDED, are the queries' heads in
    turn.

    With a window the splits begin at the first tile that a query sees.
    """
    split = tl.program_id(AXIS)
    request = tl.program_id(2)
    length = tl.load(seq_lens + request)
    window = tl.where(window > 0, window, 1 << 30)
    first = tl.maximum(length - (queries - 1) - window, 0) // TILE * TILE
    size = split_tokens(tl.minimum(max_seq_len, window + (queries - 1 + TILE)), chunk, AXIS)
    used = tl.minimum(tl.maximum(tl.cdiv(length - first, size), 1), tl.num_programs(AXIS))
    if split >= used:
        # A block that ends without waiting would let the next kernel's wait end before the kernels before this one have.
        if PDL:
            tl.extra.cuda.gdc_wait()
        return
    begin = first + split * size
    end = tl.where(split == tl.num_programs(AXIS) - 1, length, tl.minimum(begin + size, length))
    table = block_table + request.to(tl.int64) * table_row
    coming = blocks_of(table, begin + tl.arange(0, TILE), end, inverse)

    row = tl.arange(0, ROWS)
    head = tl.program_id(1 - AXIS)
    d = tl.arange(0, D)
    # Of the head it is always true: see `finish`.
    live = (row < queries * G) & (head < kv_heads)
    m = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    if SINKS and split == 0:
        m = tl.load(sinks + head * G + row % G).to(tl.float32) * LOG2E
        total += 1.0
    if PDL:
        tl.extra.cuda.gdc_wait()

    at = q + request.to(tl.int64) * q_row + row // G * q_query + (head * G + row % G) * q_head
    x = tl.load(at[:, None] + d[None, :], live[:, None], other=0.0)
    # An fp8 number becomes a float16 in half an instruction, a bfloat16 in several; none is out of range there but in q.
    FP8: tl.constexpr = kv_cache.dtype.element_ty == tl.float8e4nv
    if FP8:
        x = tl.clamp(x.to(tl.float32), -65504.0, 65504.0).to(tl.float16)
    if INTERPRETED:
        x = x.to(tl.float32)
    # A row sees the tokens up to its query's own.
    limit = length - queries + 1 + row // G
    acc = tl.zeros([ROWS, D], tl.float32)
    m, total, acc = tokens_of_split(
        x, m, total, acc, kv_cache + head.to(tl.int64) * head_stride, table, coming, begin, end, limit, window,
        scale * k_scale * LOG2E, softcap * LOG2E, page, inverse, block_stride, slot_stride, D, TILE, STAGES, FORM, WARPS,
        CAUSAL, True, True,
    )  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    finish(out, out_row, workspace, used, m, total, acc, v_scale, queries, kv_heads, G, D, PADDED, HELD, AT_ONCE, AXIS)


def launch(
    out, q, kv_cache, block_table, seq_lens, sinks, max_seq_len, scale, softcap, window, k_scale, v_scale, group,
    max_queries, workspace, *, config, _launcher,
):  # fmt: skip
    """A block per split, kv head and request; see lib.split_chunk for config["chunk"]."""
    if q.dim() == 3:  # called directly; the doors make it four
        out, q = out.unsqueeze(1), q.unsqueeze(1)
    requests, queries, heads, dim = q.shape
    kv_heads, page = kv_cache.size(1), kv_cache.size(2)
    lib.check_cache("paged_attention_decode", kv_cache, heads, group, max_seq_len)
    if queries > max_queries or out.size(1) != queries:
        raise ValueError(
            f"paged_attention_decode: {queries} queries, {out.size(1)} in out; the kernel takes up to {max_queries}"
        )
    if q.stride(3) != 1:
        raise ValueError(f"paged_attention_decode: heads of q have the stride {q.stride(3)}; the kernel takes 1")
    rows = max_queries * group
    chunk, padded = lib.split_chunk(config["chunk"], rows), triton.next_power_of_2(rows)
    grid = lib.grid_of(config, lib.splits_of(max_seq_len, requests * kv_heads, rows, chunk), kv_heads, requests)
    tensors = (out, q, kv_cache, block_table, seq_lens, sinks, workspace.view(torch.float32))
    rule, sizes = (scale, softcap, window, k_scale, v_scale), (queries, kv_heads, chunk, page, lib.page_inverse(page))
    strides = (out.stride(0), q.stride(0), q.stride(1), q.stride(2), *lib.cache_strides(kv_cache, block_table))
    tile = {"G": group, "D": dim, "ROWS": max(16, padded), "PADDED": padded}
    flags = {"CAUSAL": max_queries > 1, "SINKS": sinks is not None}
    options = lib.options(config, rows, dim)
    _launcher(paged_attention_decode, grid, *tensors, max_seq_len, *rule, *sizes, *strides, **tile, **flags, **options)


def candidates(sizes: dict[str, int], variant: Variant) -> list[dict[str, Any]]:
    """Configs worth measuring."""
    group = int(variant.static["group"])
    return lib.candidates(sizes, group * int(variant.static["max_queries"]), group)
