"""Attention over K and V that lie in tensors, dense or packed: the Triton kernel of attention_dense and attention_varlen.

Grid (blocks of rows, kv heads, sequences). The rows of a kv head are its query heads' in turn, query by query: row r is query
r // group, head r % group of the group. So K and V are read once for a group, also where a sequence has one query. A block
goes through the keys that its rows see; those that all of them see need no mask.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .triton_launch import launch_options
from .triton_softmax import INTERPRETED, LOG2E, capped, weighted

#: Sequences, and kv heads, that a grid takes.
LARGEST_GRID = 65535


@triton.jit
def attention(
    out, q, k, v, k_tiles, v_tiles, cu_seqlens_q, cu_seqlens_k, scale, softcap, window, queries, keys, group, out_sequence,
    out_head, out_row, q_sequence, q_head, q_row, k_sequence, k_head, k_row, v_sequence, v_head, v_row,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, CAUSAL: tl.constexpr,
    LIMITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """With cu_seqlens the sequences are packed: sequence strides are then 0, and queries and keys are not looked at.

    k_tiles and v_tiles are TMA descriptors [sequences, kv heads, keys, D], or packed [tokens, kv heads, D]; or None, and K and
    V are read through k and v. Blocks with the most keys come first.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1)
    sequence = tl.program_id(2)
    first_q = tl.cast(0, tl.int64)
    first_k = tl.cast(0, tl.int64)
    if cu_seqlens_q is not None:
        first_q = tl.load(cu_seqlens_q + sequence).to(tl.int64)
        queries = (tl.load(cu_seqlens_q + sequence + 1) - first_q).to(tl.int32)
        first_k = tl.load(cu_seqlens_k + sequence).to(tl.int64)
        keys = (tl.load(cu_seqlens_k + sequence + 1) - first_k).to(tl.int32)
    first_row = block * BLOCK_M
    if first_row >= queries * group:
        return
    row = first_row + tl.arange(0, BLOCK_M)
    d = tl.arange(0, D)
    live = row < queries * group
    query = row // group
    head = (kv_head * group + row - query * group).to(tl.int64)
    at = q + sequence.to(tl.int64) * q_sequence + head * q_head + (first_q + query) * q_row
    x = tl.load(at[:, None] + d[None, :], live[:, None], other=0.0)
    if INTERPRETED:
        x = x.to(tl.float32)

    # Row r sees keys below limit[r]; all rows those below `whole`, none those from `end` on.
    limit = tl.zeros([BLOCK_M], tl.int32) + keys
    whole = keys
    end = keys
    if CAUSAL:
        limit = query + (1 + keys - queries)
        whole = tl.minimum(tl.maximum(first_row // group + (1 + keys - queries), 0), keys)
        last = tl.minimum(first_row + BLOCK_M, queries * group) - 1
        end = tl.minimum(tl.maximum(last // group + (1 + keys - queries), 0), keys)
    whole = whole // BLOCK_N * BLOCK_N

    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    k += sequence.to(tl.int64) * k_sequence + kv_head.to(tl.int64) * k_head + first_k * k_row
    v += sequence.to(tl.int64) * v_sequence + kv_head.to(tl.int64) * v_head + first_k * v_row
    begin = 0
    if LIMITS:
        window = tl.where(window > 0, window, 1 << 30)
        begin = tl.maximum(first_row // group + (1 + keys - queries) - window, 0) // BLOCK_N * BLOCK_N
    else:
        m, total, acc = some_keys(
            x, m, total, acc, k, v, k_tiles, v_tiles, sequence, kv_head, first_k, 0, whole, keys, limit, scale, softcap,
            window, k_row, v_row, D, BLOCK_N, STAGES, False, CAUSAL, False,
        )  # fmt: skip
        begin = whole
    m, total, acc = some_keys(
        x, m, total, acc, k, v, k_tiles, v_tiles, sequence, kv_head, first_k, begin, end, keys, limit, scale, softcap,
        window, k_row, v_row, D, BLOCK_N, STAGES, True, CAUSAL, LIMITS,
    )  # fmt: skip

    y = weighted(acc, total)
    to = out + sequence.to(tl.int64) * out_sequence + head * out_head + (first_q + query) * out_row
    tl.store(to[:, None] + d[None, :], y.to(out.dtype.element_ty), live[:, None])


@triton.jit
def some_keys(
    x, m, total, acc, k, v, k_tiles, v_tiles, sequence, kv_head, first_k, begin, end, keys, limit, scale, softcap, window,
    k_row, v_row,
    D: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr,
    LIMITS: tl.constexpr,
):  # fmt: skip
    """(m, total, acc) after the keys begin to end, BLOCK_N at a time; without MASK whole blocks that every row sees.

    x [rows, D]; m, total [rows], acc [rows, D] float32: the greatest score so far times log2(e), the sum of exp2(score - m),
    and that of the V's with these weights.
    """
    d = tl.arange(0, D)
    n = tl.arange(0, BLOCK_N)
    scale_log2 = scale * LOG2E
    for start in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        inside = start + n < keys
        y = keys_at(k, k_tiles, sequence, kv_head, first_k, start, inside, k_row, n, d, MASK)
        s = tl.dot(x, tl.trans(y.to(x.dtype)))
        if LIMITS:
            s *= scale_log2
            if softcap > 0:
                s = capped(s, softcap * LOG2E)
        if MASK:
            seen = inside[None, :]
            if CAUSAL:
                seen = seen & ((start + n)[None, :] < limit[:, None])
            if LIMITS:
                seen = seen & ((start + n)[None, :] >= limit[:, None] - window)
            s = tl.where(seen, s, float("-inf"))
        top = tl.max(s, 1)
        top = tl.maximum(m, top if LIMITS else top * scale_log2)
        safe = top
        if MASK:
            # A row that has seen no key yet has the maximum -inf.
            safe = tl.where(top == float("-inf"), 0.0, top)
        p = tl.exp2((s if LIMITS else s * scale_log2) - safe[:, None])
        alpha = tl.exp2(m - safe)
        total = total * alpha + tl.sum(p, 1)
        z = keys_at(v, v_tiles, sequence, kv_head, first_k, start, inside, v_row, n, d, MASK)
        if MASK and v_tiles is not None:
            # What lies behind packed keys is another sequence's: 0 times its NaN would be NaN.
            z = tl.where(inside[:, None], z, 0.0)
        acc = tl.dot(p.to(z.dtype) if not INTERPRETED else p, z.to(x.dtype), acc * alpha[:, None])
        m = top
    return m, total, acc


@triton.jit
def keys_at(base, tiles, sequence, kv_head, first_k, start, inside, stride, n, d, MASK: tl.constexpr):
    """K or V [BLOCK_N, D] of the keys from `start` on."""
    if tiles is not None:
        if len(tiles.shape) == 4:
            found = tiles.load([sequence, kv_head, start, 0])
        else:
            found = tiles.load([(first_k + start).to(tl.int32), kv_head, 0])
        found = tl.reshape(found, (n.shape[0], d.shape[0]))
    elif MASK:
        at = base + tl.cast(start, tl.int64) * stride + n[:, None] * stride + d[None, :]
        found = tl.load(at, inside[:, None], other=0.0)
    else:
        found = tl.load(base + tl.cast(start, tl.int64) * stride + n[:, None] * stride + d[None, :])
    return found


class Rule(NamedTuple):
    """What a query sees and how scores become weights: the ops' last arguments."""

    scale: float
    softcap: float
    window: int
    causal: bool
    limits: bool


#: out, q, k and v.
Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def launch_dense(op: str, tensors: Tensors, rule: Rule, config: dict[str, Any], launcher: Callable[..., None]) -> None:
    """A block for BLOCK_M rows of every kv head and sequence of [sequences, heads, tokens, head_dim]."""
    out, q, k, v = tensors
    sequences, heads, queries, dim = q.shape
    kv_heads, keys = k.size(1), k.size(2)
    _check(op, tensors, sequences, rule)
    if queries < 1 or keys < 1:
        raise ValueError(f"{op}: {queries} queries of {keys} keys; the kernel takes 1 and more")
    if v.size(1) != kv_heads or v.size(2) != keys or out.size(2) != queries:
        raise ValueError(f"{op}: k is {tuple(k.shape)}, v {tuple(v.shape)}, q {tuple(q.shape)}, out {tuple(out.shape)}")
    shape, block = [sequences, kv_heads, keys, dim], [1, 1, config["block_n"], dim]
    tiles = [_tiles(each, shape, [each.stride(axis) for axis in range(3)], block, config) for each in (k, v)]
    strides = [each.stride(axis) for each in tensors for axis in range(3)]
    group = heads // kv_heads
    grid = (_blocks(queries * group, config), kv_heads, sequences)
    _launch(grid, (*tensors, *tiles, None, None), rule, (queries, keys, group, *strides), config, launcher)


def launch_packed(
    op: str, tensors: Tensors, cu_seqlens: tuple[torch.Tensor, torch.Tensor], max_seqlen_q: int, rule: Rule,
    config: dict[str, Any], launcher: Callable[..., None],
) -> None:  # fmt: skip
    """The same of packed [tokens, heads, head_dim]; blocks behind a sequence's end leave at once."""
    _out, q, k, v = tensors
    heads, dim = q.size(1), q.size(2)
    keys, kv_heads = k.size(0), k.size(1)
    sequences = cu_seqlens[0].size(0) - 1
    _check(op, tensors, sequences, rule)
    if keys < 1:
        raise ValueError(f"{op}: {keys} keys; the kernel takes 1 and more")
    if v.size(0) != keys or v.size(1) != kv_heads or cu_seqlens[1].size(0) != cu_seqlens[0].size(0):
        raise ValueError(f"{op}: k is {tuple(k.shape)}, v {tuple(v.shape)}, {sequences} sequences")
    shape, block = [keys, kv_heads, dim], [config["block_n"], 1, dim]
    tiles = [_tiles(each, shape, [each.stride(axis) for axis in range(2)], block, config) for each in (k, v)]
    strides = [stride for each in tensors for stride in (0, each.stride(1), each.stride(0))]
    group = heads // kv_heads
    # No sequence is longer than all of them: a bound that is far too large would cost a block for each row of it.
    longest = torch.sym_min(max_seqlen_q, q.size(0))
    grid = (_blocks(longest * group, config), kv_heads, sequences)
    _launch(grid, (*tensors, *tiles, *cu_seqlens), rule, (0, 0, group, *strides), config, launcher)


def _tiles(x: torch.Tensor, shape: list[Any], strides: list[Any], block: list[int], config: dict[str, Any]) -> Any:
    """A TMA descriptor of K or V, if the config asks for one."""
    return TensorDescriptor(x, shape, [*strides, 1], block) if config.get("tma", False) else None


def _blocks(rows: Any, config: dict[str, Any]) -> Any:
    return (rows + (config["block_m"] - 1)) // config["block_m"]


def _check(op: str, tensors: Tensors, sequences: Any, rule: Rule) -> None:
    """ValueError for what the kernel does not take: these become guards of the record."""
    heads, kv_heads = tensors[1].size(1), tensors[2].size(1)
    if kv_heads < 1 or heads % kv_heads != 0:
        raise ValueError(f"{op}: {heads} query heads; the kernel takes multiples of the {kv_heads} kv heads")
    if sequences < 1 or sequences > LARGEST_GRID or kv_heads > LARGEST_GRID:
        raise ValueError(f"{op}: {sequences} sequences, {kv_heads} kv heads; the kernel takes 1 to {LARGEST_GRID}")
    if rule.limits and not rule.causal and rule.window != 0:
        raise ValueError(f"{op}: a window of {rule.window}; without causal it takes 0")
    for each in tensors:
        if each.stride(-1) != 1:
            raise ValueError(f"{op}: heads have the stride {each.stride(-1)}; the kernel takes 1")


def _launch(
    grid: tuple[Any, Any, Any], tensors: tuple[Any, ...], rule: Rule, sizes: tuple[Any, ...], config: dict[str, Any],
    launcher: Callable[..., None],
) -> None:  # fmt: skip
    tile = {"D": tensors[1].size(-1), "BLOCK_M": config["block_m"], "BLOCK_N": config["block_n"], "STAGES": config["stages"]}
    options = {"CAUSAL": rule.causal, "LIMITS": rule.limits, **launch_options(config, num_stages=None)}
    launcher(attention, grid, *tensors, *rule[:3], *sizes, **tile, **options)


def candidates(sizes: dict[str, int]) -> list[dict[str, Any]]:
    """Configs worth measuring: block_m rows, block_n keys; tma says how K and V are read."""
    dim, queries = sizes["K"], sizes.get("max_seqlen_q", 2**15)
    if queries <= 16:
        shapes = [(16, 32, 4, 3), (16, 64, 4, 3), (64, 64, 4, 3), (16, 128, 4, 2), (16, 32, 4, 4)]
    elif dim >= 256:
        shapes = [(128, 32, 8, 3), (64, 32, 4, 3), (128, 64, 8, 2)]
    elif dim == 128:
        shapes = [(128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 3), (128, 64, 8, 2), (64, 64, 4, 2)]
    else:
        shapes = [(128, 128, 8, 2), (128, 64, 4, 3), (64, 64, 4, 3), (128, 64, 8, 3), (128, 128, 8, 3)]
    found = [{"block_m": m, "block_n": n, "num_warps": w, "stages": s} for m, n, w, s in shapes]
    return found + [{**each, "tma": True} for each in found if queries > 16]
