"""The Helion kernel of paged_attention_decode: a block for each request, kv head, query and split of the request's tokens.

As in kernels/lib/attention.py, splits leave their sums in the workspace, and the block that counts itself last adds them up.
Every query has blocks of its own: rows that see different tokens would need a mask for each. With one query head per kv head
it takes a multiple of 16 heads, which it is compiled for.
"""

from __future__ import annotations

from typing import Any

import helion
import helion.language as hl
import torch
from hdispatch.opspec import WORKSPACE_COUNTERS, Variant
from helion.autotuner import PowerOfTwoFragment

from ..lib.workspace import ROWS, SPLITS

LOG2E = 1.4426950408889634


def multiplied(x: torch.Tensor, cache: torch.dtype) -> torch.Tensor:
    """q as it is multiplied: float16 with fp8 caches, whose numbers are float16's too."""
    if cache == torch.float8_e4m3fn:
        return torch.clamp(x.to(torch.float32), -65504.0, 65504.0).to(torch.float16)
    return x


# 64-bit offsets: a cache has more than 2**31 elements.
@helion.kernel(static_shapes=False, index_dtype=torch.int64)
def paged_attention_decode(
    out: torch.Tensor, q: torch.Tensor, kv_cache: torch.Tensor, block_table: torch.Tensor, seq_lens: torch.Tensor,
    sinks: torch.Tensor | None, max_seq_len: int, scale: float, softcap: float, window: int, k_scale: float, v_scale: float,
    group: int, max_queries: int, workspace: torch.Tensor,
) -> None:  # fmt: skip
    requests, queries, _, dim = q.size()
    dim = hl.specialize(dim)
    group = hl.specialize(group)
    kv_heads = kv_cache.size(1)
    page = kv_cache.size(2)
    # Not view: of a size that it splits, it makes a quotient again, which differs from call to call.
    sizes = (requests, queries, kv_heads, group, dim)
    rows = q.as_strided(sizes, (q.stride(0), q.stride(1), group * q.stride(2), q.stride(2), q.stride(3)))
    to = out.as_strided(sizes, (out.stride(0), out.stride(1), group * out.stride(2), out.stride(2), 1))
    # Two indices at once, block and place, mean their product: so the cache is addressed as what it lies in.
    block_stride, head_stride, slot_stride = kv_cache.stride(0), kv_cache.stride(1), kv_cache.stride(2)
    flat = kv_cache.as_strided((kv_cache.size(0) * block_stride,), (1,))
    if sinks is not None:
        scores = sinks.as_strided((kv_heads, group), (group, 1))
    # Splits, as lib.attention.splits_of has them, and the tokens of each.
    chunk = hl.register_tunable("chunk", PowerOfTwoFragment(64, 2**20, 256))
    pairs = requests * kv_heads * queries
    needed = (max_seq_len + (chunk - 1)) // chunk
    splits = torch.sym_max(1, torch.sym_min(needed, min(SPLITS, ROWS // group) // pairs))
    size = chunk * ((needed + (splits - 1)) // splits)
    counters = workspace[:WORKSPACE_COUNTERS].view(torch.int32)
    floats = workspace[WORKSPACE_COUNTERS:].view(torch.float32)
    tops = floats.as_strided((pairs, splits, group), (splits * group, group, 1))
    sums = floats[ROWS:].as_strided((pairs, splits, group), (splits * group, group, 1))
    parts = floats[2 * ROWS :].as_strided((pairs, splits, group, dim), (splits * group * dim, group * dim, dim, 1))
    hl.pdl_wait()
    for request, head, query, split in hl.tile([requests, kv_heads, queries, splits], block_size=[1, 1, 1, 1]):
        limit = seq_lens[request.begin] - queries + 1 + query.begin
        first = torch.where(limit * 0 + window > 0, torch.clamp(limit - window, min=0), limit * 0)
        used = torch.clamp((limit - first + (size - 1)) // size, min=1, max=splits)
        begin = first + split.begin * size
        end = torch.where(limit * 0 + split.begin == splits - 1, limit, torch.minimum(begin + size, limit))
        end = torch.maximum(begin, end)
        x = multiplied(rows[request.begin, query.begin, head.begin, :, :], kv_cache.dtype)
        m = hl.full([group], float("-inf"), dtype=torch.float32)
        total = hl.full([group], 0.0, dtype=torch.float32)
        if sinks is not None:
            is_first = hl.full([group], 0, dtype=torch.int32) + split.begin == 0
            m = torch.where(is_first, scores[head.begin, :].to(torch.float32) * LOG2E, m)
            total = torch.where(is_first, total + 1.0, total)
        cap = hl.full([group], 0.0, dtype=torch.float32) + softcap
        acc = hl.zeros([group, dim], dtype=torch.float32)
        for token in hl.tile(begin, end):
            at = token.index
            block = block_table[request.begin, at // page].to(torch.int64)
            place = block * block_stride + at % page * slot_stride + head.begin * head_stride
            inside = (at < end)[:, None]
            k = hl.load(flat, [place[:, None] + hl.arange(dim)[None, :]], extra_mask=inside).to(x.dtype)
            v = hl.load(flat, [place[:, None] + (dim + hl.arange(dim))[None, :]], extra_mask=inside).to(x.dtype)
            s = hl.dot(x, k.T, out_dtype=torch.float32) * (scale * k_scale)
            capped = cap[:, None] * torch.tanh(s / torch.where(cap > 0, cap, 1.0)[:, None])
            s = torch.where(cap[:, None] > 0, capped, s) * LOG2E
            s = torch.where((at < end)[None, :], s, float("-inf"))
            top = torch.maximum(m, torch.amax(s, -1))
            p = torch.exp2(s - top[:, None])
            alpha = torch.exp2(m - top)
            total = total * alpha + torch.sum(p, -1)
            acc = hl.dot(p.to(x.dtype), v, acc=acc * alpha[:, None])
            m = top
        if used == 1:
            if split.begin == 0:
                weight = torch.where(total > 0, v_scale / total, 0.0)
                to[request.begin, query.begin, head.begin, :, :] = (acc * weight[:, None]).to(out.dtype)
        else:
            if split.begin < used:
                pair = (request.begin * kv_heads + head.begin) * queries + query.begin
                parts[pair, split.begin, :, :] = acc
                tops[pair, split.begin, :] = m
                sums[pair, split.begin, :] = total
                before = hl.atomic_add(counters, [pair], 1, sem="acq_rel")
                if before == used - 1:
                    counters[pair] = 0
                    m_all = hl.full([group], float("-inf"), dtype=torch.float32)
                    total_all = hl.full([group], 0.0, dtype=torch.float32)
                    acc_all = hl.zeros([group, dim], dtype=torch.float32)
                    for other in hl.tile(0, used):
                        there = (other.index < used)[:, None]
                        m_here = torch.where(there, tops[pair, other, :], float("-inf"))
                        top_all = torch.maximum(m_all, torch.amax(m_here, 0))
                        weights = torch.exp2(m_here - top_all[None, :])
                        kept = torch.exp2(m_all - top_all)
                        total_all = total_all * kept + torch.sum(weights * sums[pair, other, :], 0)
                        acc_all = acc_all * kept[:, None] + torch.sum(weights[:, :, None] * parts[pair, other, :, :], 0)
                        m_all = top_all
                    factor = torch.where(total_all > 0, v_scale / total_all, 0.0)
                    to[request.begin, query.begin, head.begin, :, :] = (acc_all * factor[:, None]).to(out.dtype)


KERNEL = paged_attention_decode


def check(_out: torch.Tensor, q: torch.Tensor, kv_cache: torch.Tensor, *others: Any) -> None:
    """ValueError for what the kernel does not take: these become guards of the record."""
    max_queries = others[10]
    if q.size(1) < 1 or q.size(1) > max_queries:
        raise ValueError(f"paged_attention_decode: {q.size(1)} queries; the kernel takes 1 to {max_queries}")
    if kv_cache.stride(3) != 1:
        raise ValueError(f"paged_attention_decode: K and V of a head have the stride {kv_cache.stride(3)}; the kernel takes 1")


def candidates(sizes: dict[str, int], _variant: Variant) -> list[dict[str, Any]]:
    """Configs worth measuring: 32 to 128 tokens at a time, and the splits that the Triton kernel has for these sizes."""
    longest = sizes.get("max_seq_len", 2**15)
    chunks = [chunk for chunk in (64, 128, 256, 512, 1024, 2048) if chunk < longest and sizes["M"] * longest < 2048 * chunk]
    shapes = [(32, 4, 3), (32, 4, 2)] if sizes["K"] >= 256 else [(64, 4, 3), (64, 4, 2), (32, 4, 4)]
    common = {"indexing": "pointer", "pid_type": "flat"}
    return [
        {"block_sizes": [tile, 8], "num_warps": warps, "num_stages": stages, "chunk": chunk, **common}
        for tile, warps, stages in shapes
        for chunk in (*(chunk for chunk in chunks if chunk >= tile), 2**20)
    ]
