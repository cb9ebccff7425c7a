"""Decode attention over a paged KV cache, split over the sequence: what the Triton kernels of the attention ops share.

Grid (splits, kv heads, requests), or (kv heads, splits, requests): AXIS is that of the splits. A block has the query rows of
one kv head and request, `queries * group` of them padded to what tensor cores take, and goes through the tokens of its split.
Where a request has several splits, each leaves its sums in the workspace, and the block that counts itself last adds them up:
one launch, nothing between blocks but that count.

A split has `split_chunk` tokens, whatever the requests beside it; more only where the workspace has fewer cells than that
takes. The last split of the grid takes all that is left: a request longer than max_seq_len is slow, not wrong.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from hdispatch.opspec import WORKSPACE_COUNTERS

from .hopper import SMS
from .triton_launch import launch_options
from .triton_softmax import INTERPRETED, capped, weighted
from .workspace import cells, rows_held

#: How a block multiplies: see tokens_of_split.
FORMS = ("rows", "tokens", "warps")
#: A chunk that no request is longer than: no splits.
WHOLE = 2**20
# In elements of float32: where the counters end.
_COUNTERS = tl.constexpr(WORKSPACE_COUNTERS // 4)


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
    warps, form = config["num_warps"], config.get("form", "rows")
    if form not in FORMS:
        raise ValueError(f"the form of {config} is none of {', '.join(FORMS)}; tune the op again, or name one of them")
    shape = {"FORM": form, "WARPS": warps, "AXIS": 1 if config.get("heads_first") else 0}
    sums = {"HELD": rows_held(rows), "AT_ONCE": config.get("at_once", parts_at_once(rows, dim, warps))}
    return {"TILE": config["tile"], "STAGES": config["stages"], **shape, **sums, **launch_options(config, num_stages=None)}


def grid_of(config: dict[str, Any], splits: Any, kv_heads: Any, requests: Any) -> tuple[Any, Any, Any]:
    """The grid; with `heads_first` blocks that run at the same time read the same tokens, which lie side by side."""
    return (kv_heads, splits, requests) if config.get("heads_first") else (splits, kv_heads, requests)


def candidates(sizes: dict[str, int], rows: int, group: int) -> list[dict[str, Any]]:
    """Configs worth measuring, for blocks of `rows` query rows, of queries of `group` heads.

    stages       4 and more leave an SM fewer blocks, with more bytes on their way
    chunk        tokens of a split, before split_chunk: so many that each SM gets one block of the longest requests, or several
    form         see tokens_of_split
    heads_first  see grid_of
    at_once      parts that the last block loads at once; more of them cost registers
    """
    dim, kv_heads = sizes["K"], max(1, sizes["N"] // group)
    if dim >= 256 or rows > 32:
        tiles = [(32, 4, 3, "rows"), (32, 4, 4, "rows"), (32, 8, 3, "rows"), (64, 8, 2, "rows"), (32, 4, 2, "rows")]
    else:
        tiles = [(64, 4, 3, "rows"), (64, 4, 2, "rows"), (32, 4, 5, "rows"), (128, 4, 2, "rows"), (128, 8, 3, "rows")]
        tiles += [(64, 4, 2, "tokens"), (64, 4, 3, "tokens"), (128, 8, 2, "tokens")]
        tiles += [(64, 4, 3, "warps"), (64, 4, 4, "warps")] if rows <= 16 else [(64, 4, 4, "rows"), (64, 8, 3, "rows")]
    found = []
    for tile, warps, stages, form in tiles:
        shape = {"tile": tile, "num_warps": warps, "stages": stages, **({} if form == "rows" else {"form": form})}
        found.append({**shape, "chunk": WHOLE})
        for chunk in _chunks(sizes, rows, tile, kv_heads):
            split = {**shape, "chunk": chunk}
            found += [split, *([{**split, "heads_first": True}] if kv_heads > 1 else [])]
            if shape == {"tile": 64, "num_warps": 4, "stages": 3}:
                found.append({**split, "at_once": 2 * parts_at_once(rows, dim, warps)})
    return found


#: Blocks that an SM gets, on average, where all requests are the longest.
BLOCKS_OF_AN_SM = (1, 2, 3, 4, 6, 8, 12, 16)


def _chunks(sizes: dict[str, int], rows: int, tile: int, kv_heads: int) -> list[int]:
    """Values of config["chunk"], whole tiles, with which the longest requests have 2 splits or more."""
    longest, pairs = sizes.get("max_seq_len", 2**15), sizes["M"] * kv_heads
    splits = {min(cells(rows) // pairs, SMS * blocks // pairs) for blocks in BLOCKS_OF_AN_SM}
    tokens = {-(-longest // (count * tile)) * tile for count in splits if count > 1}
    given = {chunk: split_chunk(chunk, rows) for size in tokens for chunk in (size, size // 2)}
    return sorted({chunk for chunk, size in given.items() if size in tokens and size < longest})


@triton.jit
def split_tokens(max_tokens, chunk, AXIS: tl.constexpr):
    """Tokens of a split of this grid: `chunk`, or as many times that as the grid has too few splits."""
    needed = tl.cdiv(max_tokens, chunk)
    return chunk * tl.maximum(tl.cdiv(needed, tl.num_programs(AXIS)), 1)


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
    D: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr, FORM: tl.constexpr, WARPS: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """(m, total, acc) after the tokens begin to end, TILE at a time.

    x [rows, D] has the dtype in which matrices are multiplied; m, total [rows], acc [rows, D] float32: the greatest score so
    far times log2(e), the sum of exp2(score - m), and that of the V's with these weights. A row sees tokens below limit[row]
    (with CAUSAL) and from limit[row] - window on (with WINDOW).

    The blocks of a tile are asked for one turn before (`coming` has the first tile's): a turn's copies then depend on no load
    of their own, and the pipeline gets as deep as STAGES says.

    FORM  "rows": all warps multiply matrices [rows, TILE]; "tokens": matrices [TILE, rows], whose 64 rows wgmma takes from
          shared memory; "warps": each of the WARPS multiplies its own tokens of a tile and waits for no other one's maximum
    """
    if FORM == "warps":
        return _by_warps(
            x, m, total, acc, cache, table, coming, begin, end, limit, window, scale_log2, softcap_log2, page, inverse,
            block_stride, slot_stride, D, TILE, STAGES, WARPS, CAUSAL, WINDOW, SOFTCAP,
        )  # fmt: skip
    elif FORM == "tokens":  # noqa: RET505 -- Triton compiles what follows a return
        return _tokens_first(
            x, m, total, acc, cache, table, coming, begin, end, limit, window, scale_log2, softcap_log2, page, inverse,
            block_stride, slot_stride, D, TILE, STAGES, CAUSAL, WINDOW, SOFTCAP,
        )  # fmt: skip
    else:
        return _rows_first(
            x, m, total, acc, cache, table, coming, begin, end, limit, window, scale_log2, softcap_log2, page, inverse,
            block_stride, slot_stride, D, TILE, STAGES, CAUSAL, WINDOW, SOFTCAP,
        )  # fmt: skip


@triton.jit
def scores_of(
    s, token, limit, end, window, scale_log2, softcap_log2, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr
):
    """Products s of q and K as scores times log2(e), -inf of tokens that a row does not see; token and limit broadcast to s."""
    s = s * scale_log2
    if SOFTCAP and softcap_log2 > 0:
        s = capped(s, softcap_log2)
    seen = token < end
    if CAUSAL:
        seen = seen & (token < limit)
    if WINDOW:
        seen = seen & (token >= limit - window)
    return tl.where(seen, s, float("-inf"))


@triton.jit
def finite(top):
    """A maximum as it is subtracted: a row that has seen no token yet has -inf."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def _rows_first(
    x, m, total, acc, cache, table, coming, begin, end, limit, window, scale_log2, softcap_log2, page, inverse,
    block_stride, slot_stride,
    D: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
):  # fmt: skip
    d = tl.arange(0, D)
    for start in tl.range(begin, end, TILE, num_stages=STAGES):
        token = start + tl.arange(0, TILE)
        inside = token < end
        place = places_of(coming, token, page, inverse, block_stride, slot_stride)
        coming = blocks_of(table, token + TILE, end, inverse)
        k = tl.load(cache + place[:, None] + d[None, :], inside[:, None], other=0.0)
        v = tl.load(cache + D + place[:, None] + d[None, :], inside[:, None], other=0.0)
        s = tl.dot(x, tl.trans(k.to(x.dtype)))
        s = scores_of(s, token[None, :], limit[:, None], end, window, scale_log2, softcap_log2, CAUSAL, WINDOW, SOFTCAP)
        top = tl.maximum(m, tl.max(s, 1))
        safe = finite(top)
        p = tl.exp2(s - safe[:, None])
        alpha = tl.exp2(m - safe)
        total = total * alpha + tl.sum(p, 1)
        acc = tl.dot(p.to(x.dtype), v.to(x.dtype), acc * alpha[:, None])
        m = top
    return m, total, acc


@triton.jit
def _tokens_first(
    x, m, total, acc, cache, table, coming, begin, end, limit, window, scale_log2, softcap_log2, page, inverse,
    block_stride, slot_stride,
    D: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Sums of weights stay as they are, one for each place in a tile, until the end: no warp waits for another one's."""
    d = tl.arange(0, D)
    i = tl.arange(0, TILE)
    x = tl.trans(x)
    acc = tl.trans(acc)
    sums = tl.where((i == 0)[:, None], total[None, :], 0.0)
    for start in tl.range(begin, end, TILE, num_stages=STAGES):
        token = start + i
        inside = token < end
        place = places_of(coming, token, page, inverse, block_stride, slot_stride)
        coming = blocks_of(table, token + TILE, end, inverse)
        k = tl.load(cache + place[:, None] + d[None, :], inside[:, None], other=0.0)
        v = tl.load(cache + D + place[:, None] + d[None, :], inside[:, None], other=0.0)
        s = tl.dot(k.to(x.dtype), x)
        s = scores_of(s, token[:, None], limit[None, :], end, window, scale_log2, softcap_log2, CAUSAL, WINDOW, SOFTCAP)
        top = tl.maximum(m, tl.max(s, 0))
        safe = finite(top)
        p = tl.exp2(s - safe[None, :])
        alpha = tl.exp2(m - safe)
        sums = sums * alpha[None, :] + p
        acc = tl.dot(tl.trans(v.to(x.dtype)), p.to(x.dtype), acc * alpha[None, :])
        m = top
    return m, tl.sum(sums, 0), tl.trans(acc)


@triton.jit
def _by_warps(
    x, m, total, acc, cache, table, coming, begin, end, limit, window, scale_log2, softcap_log2, page, inverse,
    block_stride, slot_stride,
    D: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr, WARPS: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Matrices of three dimensions, of which Triton gives each warp its own index of the first."""
    ROWS: tl.constexpr = x.shape[0]
    EACH: tl.constexpr = TILE // WARPS
    d = tl.arange(0, D)
    warp = tl.arange(0, WARPS)
    i = warp[:, None] * EACH + tl.arange(0, EACH)[None, :]
    coming = tl.reshape(coming, (WARPS, EACH))
    x = tl.broadcast_to(x[None], (WARPS, ROWS, D))
    # What there is already is the first warp's.
    first = warp == 0
    m = tl.where(first[:, None], m[None, :], float("-inf"))
    total = tl.where(first[:, None], total[None, :], 0.0)
    acc = tl.where(first[:, None, None], acc[None], 0.0)
    for start in tl.range(begin, end, TILE, num_stages=STAGES):
        token = start + i
        inside = (token < end)[:, :, None]
        place = places_of(coming, token, page, inverse, block_stride, slot_stride)[:, :, None]
        coming = blocks_of(table, token + TILE, end, inverse)
        k = tl.load(cache + place + d[None, None, :], inside, other=0.0)
        v = tl.load(cache + D + place + d[None, None, :], inside, other=0.0)
        s = tl.dot(x, tl.permute(k.to(x.dtype), (0, 2, 1)))
        s = scores_of(
            s, token[:, None, :], limit[None, :, None], end, window, scale_log2, softcap_log2, CAUSAL, WINDOW, SOFTCAP
        )
        top = tl.maximum(m, tl.max(s, 2))
        safe = finite(top)
        p = tl.exp2(s - safe[:, :, None])
        alpha = tl.exp2(m - safe)
        total = total * alpha + tl.sum(p, 2)
        acc = tl.dot(p.to(x.dtype), v.to(x.dtype), acc * alpha[:, :, None])
        m = top
    top = tl.max(m, 0)
    weight = tl.exp2(m - finite(top)[None, :])
    return top, tl.sum(total * weight, 0), _sum_of_warps(acc * weight[:, :, None], WARPS)


@triton.jit
def _halved(x):
    """x [rows, D, n] as [rows, D, n / 2]: the sums of neighbours."""
    a, b = tl.split(tl.reshape(x, (x.shape[0], x.shape[1], x.shape[2] // 2, 2)))
    return a + b


@triton.jit
def _sum_of_warps(x, WARPS: tl.constexpr):
    """The sum of x [WARPS, rows, D], 4 or 8 WARPS, over its first dimension: tl.sum goes through shared memory row by row."""
    tl.static_assert(WARPS == 4 or WARPS == 8)
    x = _halved(_halved(tl.permute(x, (1, 2, 0))))
    if WARPS == 8:
        x = _halved(x)
    return tl.reshape(x, (x.shape[0], x.shape[1]))


@triton.jit
def outputs_of(row, head, out_row, kv_heads, G: tl.constexpr, D: tl.constexpr):
    """Where the output of a block's rows begins, queries of all G heads in turn."""
    return tl.program_id(2).to(tl.int64) * out_row + (row // G * (kv_heads * G) + head * G + row % G) * D


@triton.jit
def finish(
    out, out_row, workspace, used, m, total, acc, factor, queries, kv_heads,
    G: tl.constexpr, D: tl.constexpr, PADDED: tl.constexpr, HELD: tl.constexpr, AT_ONCE: tl.constexpr,
    AXIS: tl.constexpr,
):  # fmt: skip
    """Writes the output of one (request, kv head): of its only split, or of all `used` ones by the last that comes here.

    out [requests, queries, heads, D], rows of out_row elements for a request; factor multiplies all of it. PADDED is a power
    of two of at least queries * G; HELD is workspace.rows_held.
    """
    row = tl.arange(0, acc.shape[0])
    head = tl.program_id(1 - AXIS)
    d = tl.arange(0, D)
    # No block has a head that is not there, but without the test rows would have machine code that was not measured.
    live = (row < queries * G) & (head < kv_heads)
    if used == 1:
        at = outputs_of(row, head, out_row, kv_heads, G, D)
        y = (weighted(acc, total) * factor).to(out.dtype.element_ty)
        tl.store(out + at[:, None] + d[None, :], y, live[:, None])
    else:
        counters = workspace.to(tl.pointer_type(tl.int32))
        tops = workspace + _COUNTERS
        sums = tops + HELD
        parts = sums + HELD
        pair = tl.program_id(2) * tl.num_programs(1 - AXIS) + tl.program_id(1 - AXIS)
        first = (tl.program_id(2) * kv_heads + head) * tl.num_programs(AXIS)
        cell = (first + tl.program_id(AXIS)) * (queries * G) + row
        tl.store(parts + cell[:, None] * D + d[None, :], acc, live[:, None])
        tl.store(tops + cell, m, live)
        tl.store(sums + cell, total, live)
        tl.debug_barrier()
        if tl.atomic_add(counters + pair, 1, sem="acq_rel") == used - 1:
            tl.store(counters + pair, 0)
            combine(out, out_row, tops, sums, parts, used, factor, queries, kv_heads, G, D, PADDED, AT_ONCE, AXIS)


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
    out, out_row, tops, sums, parts, used, factor, queries, kv_heads,
    G: tl.constexpr, D: tl.constexpr, PADDED: tl.constexpr, AT_ONCE: tl.constexpr, AXIS: tl.constexpr,
):  # fmt: skip
    """Adds up the splits of one (request, kv head), AT_ONCE at a time: one round trip to L2 for each.

    Each thread on its own, without a barrier that would hold loads up. Matrices only: sums over a cube's first dimension go
    through shared memory row by row in Triton 3.6.
    """
    row = tl.arange(0, PADDED)
    head = tl.program_id(1 - AXIS)
    rows = queries * G
    first = (tl.program_id(2) * kv_heads + tl.minimum(head, kv_heads - 1)) * tl.num_programs(AXIS)
    d = tl.arange(0, D)
    live = (row < rows) & (head < kv_heads)
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
    at = outputs_of(row, head, out_row, kv_heads, G, D)
    tl.store(out + at[:, None] + d[None, :], (weighted(acc, total) * factor).to(out.dtype.element_ty), live[:, None])
