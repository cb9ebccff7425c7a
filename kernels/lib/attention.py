"""Decode attention over a paged KV cache, split over the sequence: what the Triton kernels of the attention ops share.

Grid (splits, kv heads, requests). A block has the query rows of one kv head and request, `queries * group` of them padded to
what tensor cores take, and goes through the tokens of its split. Where a request has several splits, each leaves its sums in
the workspace, and the block that counts itself last adds them up: one launch, nothing between blocks but that count.

A split has `split_chunk` tokens, whatever the requests beside it; more only where the workspace has fewer cells than that
takes. The last split of the grid takes all that is left: a request longer than max_seq_len is slow, not wrong.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from hdispatch.opspec import WORKSPACE_COUNTERS

from .triton_launch import launch_options
from .triton_softmax import INTERPRETED, capped, weighted
from .workspace import MOST_ROWS, PAIRS, ROWS, cells

#: A chunk that no request is longer than: no splits.
WHOLE = 2**20
# In elements of float32.
_COUNTERS, _PAIRS = tl.constexpr(WORKSPACE_COUNTERS // 4), tl.constexpr(PAIRS)
_ROWS, _MOST_ROWS = tl.constexpr(ROWS), tl.constexpr(MOST_ROWS)


def splits_of(tokens: Any, pairs: Any, rows: int, chunk: int) -> Any:
    """Splits of the longest request, of `tokens` tokens, so that those of all pairs fit the workspace; at least 1."""
    return torch.sym_max(1, torch.sym_min((tokens + (chunk - 1)) // chunk, cells(rows) // pairs))


def split_chunk(chunk: int, rows: int) -> int:
    """Tokens of a split for blocks of `rows` query rows, of a config whose `chunk` is for up to 4.

    The last block of a pair reads rows * head_dim sums of every split, alone: with more rows, splits of few tokens do not pay.
    Of more tokens they do: 8,192 of one request, 32 rows in 4 splits, took 44 us where 16 splits take 21.
    """
    return 2 * chunk if rows > 4 and chunk <= 64 else chunk


def page_inverse(page: Any) -> Any:
    """ceil(2**32 / page): the upper half of its product with n is n // page, for n * page up to 2**32 (or page 2**i)."""
    return (2**32 + (page - 1)) // page


def check_cache(op: str, kv_cache: torch.Tensor, heads: Any, group: int, max_seq_len: Any) -> None:
    """ValueError for a cache that the kernels do not take: these become guards of the record."""
    if kv_cache.size(1) * group != heads:
        raise ValueError(f"{op}: the cache has {kv_cache.size(1)} heads of {group} query heads each, q has {heads}")
    if kv_cache.size(2) % 16 != 0 or kv_cache.size(2) * max_seq_len > 2**32:
        raise ValueError(
            f"{op}: pages of {kv_cache.size(2)} tokens; the kernel takes multiples of 16, with max_seq_len to 2**32"
        )
    if kv_cache.stride(3) != 1:
        raise ValueError(f"{op}: K and V of a head have the stride {kv_cache.stride(3)}; the kernel takes 1")


def parts_at_once(rows: int, dim: int, warps: int) -> int:
    """Parts that the last block loads at once: 64 registers a thread, and no more than 16, which are loads of 16 bytes."""
    return min(16, max(1, 64 * 32 * warps // (triton.next_power_of_2(rows) * dim)))


def cache_strides(kv_cache: torch.Tensor, block_table: torch.Tensor) -> tuple[Any, Any, Any, Any]:
    """table_row, block_stride, head_stride and slot_stride of the kernels."""
    return block_table.stride(0), kv_cache.stride(0), kv_cache.stride(1), kv_cache.stride(2)


def options(config: dict[str, Any], rows: int, dim: int) -> dict[str, Any]:
    """The constants that come from a config, and the launch options, for blocks of `rows` query rows and heads of `dim`."""
    at_once = config.get("at_once", parts_at_once(rows, dim, config["num_warps"]))
    return {"TILE": config["tile"], "STAGES": config["stages"], "AT_ONCE": at_once, **launch_options(config, num_stages=None)}


def candidates(sizes: dict[str, int], rows: int) -> list[dict[str, Any]]:
    """Configs worth measuring, for blocks of `rows` query rows; where requests have as many blocks as the GPU holds, no splits.

    stages   4 and more leave an SM fewer blocks, with more bytes on their way
    chunk    tokens of a split, before split_chunk
    at_once  parts that the last block loads at once; more of them cost registers
    """
    dim, longest = sizes["K"], sizes.get("max_seq_len", 2**15)
    if dim >= 256 or rows > 32:
        tiles = [(32, 4, 3), (32, 4, 4), (32, 8, 3), (64, 8, 2), (32, 4, 2)]
    else:
        tiles = [(64, 4, 3), (64, 4, 4), (64, 4, 5), (64, 4, 2), (32, 4, 4), (128, 4, 2), (128, 8, 3), (128, 8, 4)]
    sizes_of = {chunk: split_chunk(chunk, rows) for chunk in (32, 64, 128, 256, 512, 1024, 2048)}
    chunks = {tokens: chunk for chunk, tokens in sizes_of.items() if 2048 * tokens > sizes["M"] * longest}
    shapes = [
        {"tile": tile, "num_warps": warps, "stages": stages, "chunk": chunk}
        for tile, warps, stages in tiles
        for chunk in (*(chunk for tokens, chunk in chunks.items() if tile <= tokens < longest), WHOLE)
    ]
    tile, warps, _ = tiles[0]
    more = 2 * parts_at_once(rows, dim, warps)
    return shapes + [{**shape, "at_once": more} for shape in shapes if shape["tile"] == tile and shape["chunk"] != WHOLE]


@triton.jit
def split_tokens(max_tokens, chunk):
    """Tokens of a split of this grid: `chunk`, or as many times that as the grid has too few splits."""
    needed = tl.cdiv(max_tokens, chunk)
    return chunk * tl.maximum(tl.cdiv(needed, tl.num_programs(0)), 1)


@triton.jit
def page_of(token, inverse):
    """token // page, with page_inverse(page)."""
    return tl.umulhi(token.to(tl.uint32), tl.cast(inverse, tl.uint32)).to(tl.int32)


@triton.jit
def blocks_of(table, token, end, inverse):
    """The blocks that hold tokens of a request, 0 from token `end` on; table points to the request's row."""
    return tl.load(table + page_of(token, inverse), token < end, other=0)


@triton.jit
def places_of(block, token, page, inverse, block_stride, slot_stride):
    """Where K of a token begins, in elements from the head's place in block 0."""
    return block.to(tl.int64) * block_stride + (token - page_of(token, inverse) * page) * slot_stride


@triton.jit
def prefetch(cache, place, D: tl.constexpr):
    """Brings K and V of the tokens at `place` to L2. No read: nothing that is written later is seen as it was."""
    LINE: tl.constexpr = 1024 // cache.dtype.element_ty.primitive_bitwidth
    LINES: tl.constexpr = 2 * D // LINE
    if not INTERPRETED:
        at = cache + place[:, None] + (tl.arange(0, LINES) * LINE)[None, :]
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [at], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def tokens_of_split(
    x, m, total, acc, cache, table, coming, begin, end, limit, window, scale_log2, softcap_log2, page, inverse,
    block_stride, slot_stride,
    D: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
):  # fmt: skip
    """(m, total, acc) after the tokens begin to end, TILE at a time.

    x [rows, D] has the dtype in which matrices are multiplied; m, total [rows], acc [rows, D] float32: the greatest score so
    far times log2(e), the sum of exp2(score - m), and that of the V's with these weights. A row sees tokens below limit[row]
    (with CAUSAL) and from limit[row] - window on (with WINDOW).

    The blocks of a tile are asked for one turn before (`coming` has the first tile's): a turn's copies then depend on no load
    of their own, and the pipeline gets as deep as STAGES says.
    """
    d = tl.arange(0, D)
    for start in tl.range(begin, end, TILE, num_stages=STAGES):
        token = start + tl.arange(0, TILE)
        inside = token < end
        place = places_of(coming, token, page, inverse, block_stride, slot_stride)
        coming = blocks_of(table, token + TILE, end, inverse)
        k = tl.load(cache + place[:, None] + d[None, :], inside[:, None], other=0.0)
        v = tl.load(cache + D + place[:, None] + d[None, :], inside[:, None], other=0.0)
        s = tl.dot(x, tl.trans(k.to(x.dtype))) * scale_log2
        if SOFTCAP and softcap_log2 > 0:
            s = capped(s, softcap_log2)
        seen = inside[None, :]
        if CAUSAL:
            seen = seen & (token[None, :] < limit[:, None])
        if WINDOW:
            seen = seen & (token[None, :] >= limit[:, None] - window)
        s = tl.where(seen, s, float("-inf"))
        top = tl.maximum(m, tl.max(s, 1))
        # A row that has seen no token yet has the maximum -inf.
        safe = tl.where(top == float("-inf"), 0.0, top)
        p = tl.exp2(s - safe[:, None])
        alpha = tl.exp2(m - safe)
        total = total * alpha + tl.sum(p, 1)
        acc = tl.dot(p.to(x.dtype), v.to(x.dtype), acc * alpha[:, None])
        m = top
    return m, total, acc


@triton.jit
def outputs_of(row, out_row, G: tl.constexpr, D: tl.constexpr):
    """Where the output of a block's rows begins, queries of all G heads in turn."""
    heads = tl.num_programs(1) * G
    return tl.program_id(2).to(tl.int64) * out_row + (row // G * heads + tl.program_id(1) * G + row % G) * D


@triton.jit
def finish(
    out, out_row, workspace, used, m, total, acc, factor, queries,
    G: tl.constexpr, D: tl.constexpr, PADDED: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Writes the output of one (request, kv head): of its only split, or of all `used` ones by the last that comes here.

    out [requests, queries, heads, D], rows of out_row elements for a request; factor multiplies all of it. PADDED is a power
    of two of at least queries * G.
    """
    row = tl.arange(0, acc.shape[0])
    d = tl.arange(0, D)
    live = row < queries * G
    if used == 1:
        at = outputs_of(row, out_row, G, D)
        y = (weighted(acc, total) * factor).to(out.dtype.element_ty)
        tl.store(out + at[:, None] + d[None, :], y, live[:, None])
    else:
        counters = workspace.to(tl.pointer_type(tl.int32))
        # As workspace.rows_held says.
        wanted: tl.constexpr = _PAIRS * PADDED
        held: tl.constexpr = _ROWS if wanted < _ROWS else _MOST_ROWS if wanted > _MOST_ROWS else wanted
        tops = workspace + _COUNTERS
        sums = tops + held
        parts = sums + held
        pair = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
        cell = (pair * tl.num_programs(0) + tl.program_id(0)) * (queries * G) + row
        tl.store(parts + cell[:, None] * D + d[None, :], acc, live[:, None])
        tl.store(tops + cell, m, live)
        tl.store(sums + cell, total, live)
        tl.debug_barrier()
        if tl.atomic_add(counters + pair, 1, sem="acq_rel") == used - 1:
            tl.store(counters + pair, 0)
            combine(out, out_row, tops, sums, parts, used, factor, queries, G, D, PADDED, AT_ONCE)


@triton.jit
def from_l2(at, seen):
    """Float32 numbers at the addresses `at`, of which all can be read, or -inf where not `seen`.

    In the layout of what is made of them: a tl.load of so few gets one of its own, and then barriers to change it.
    """
    if INTERPRETED:
        found = tl.load(at)
    else:
        found = tl.inline_asm_elementwise("ld.global.cg.f32 $0, [$1];", "=f,l", [at], tl.float32, is_pure=False, pack=1)
    return tl.where(seen, found, float("-inf"))


@triton.jit
def combine(
    out, out_row, tops, sums, parts, used, factor, queries,
    G: tl.constexpr, D: tl.constexpr, PADDED: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Adds up the splits of one (request, kv head), AT_ONCE at a time: one round trip to L2 for each.

    Each thread on its own, without a barrier that would hold loads up. Matrices only: sums over a cube's first dimension go
    through shared memory row by row in Triton 3.6.
    """
    first = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0)
    rows = queries * G
    row = tl.arange(0, PADDED)
    d = tl.arange(0, D)
    live = row < rows
    top = tl.full([PADDED], float("-inf"), tl.float32)
    total = tl.zeros([PADDED], tl.float32)
    acc = tl.zeros([PADDED, D], tl.float32)
    for start in range(0, used, AT_ONCE):
        # All loads before all sums: those would wait for the first loads, and the others behind them.
        loaded = ()
        for i in tl.static_range(AT_ONCE):
            # Past the last split it is that one again, with no weight.
            seen = start + i < used
            cell = (first + tl.minimum(start + i, used - 1)) * rows + tl.minimum(row, rows - 1)
            # From L2: the first-level cache may have what an earlier launch left there.
            part = tl.load(parts + cell[:, None] * D + d[None, :], (live & seen)[:, None], other=0.0, cache_modifier=".cg")
            found = from_l2(tops + cell, seen), from_l2(sums + cell, True), part
            loaded = loaded + (found,)  # noqa: RUF005 -- Triton knows no *loaded
        for i in tl.static_range(AT_ONCE):
            part_top, part_sum, part = loaded[i]
            higher = tl.maximum(top, part_top)
            safe = tl.where(higher == float("-inf"), 0.0, higher)
            alpha, weight = tl.exp2(top - safe), tl.exp2(part_top - safe)
            total = total * alpha + part_sum * weight
            acc = acc * alpha[:, None] + part * weight[:, None]
            top = higher
    at = outputs_of(row, out_row, G, D)
    tl.store(out + at[:, None] + d[None, :], (weighted(acc, total) * factor).to(out.dtype.element_ty), live[:, None])
