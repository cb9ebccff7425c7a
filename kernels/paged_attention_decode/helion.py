"""A Helion kernel of paged_attention_decode: a block for each request, kv head and query, which goes through all its tokens.

No splits: see README on what Helion lacks for them. Where requests are many enough to fill the GPU that costs nothing.
"""

from __future__ import annotations

from typing import Any

import helion
import helion.language as hl
import torch
from hdispatch.opspec import Variant

LOG2E = 1.4426950408889634


def multiplied(x: torch.Tensor, cache: torch.dtype) -> torch.Tensor:
    """q as it is multiplied: float16 with fp8 caches, whose numbers are float16's too."""
    if cache == torch.float8_e4m3fn:
        return torch.clamp(x.to(torch.float32), -65504.0, 65504.0).to(torch.float16)
    return x


# 64-bit offsets: a cache has more than 2**31 elements.
@helion.kernel(static_shapes=False, index_dtype=torch.int64)
def paged_attention_decode(
    out: torch.Tensor,
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    sinks: torch.Tensor | None,
    max_seq_len: int,
    scale: float,
    softcap: float,
    window: int,
    k_scale: float,
    v_scale: float,
    group: int,
    max_queries: int,
    workspace: torch.Tensor,
) -> None:
    requests, queries, heads, dim = q.size()
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
    hl.pdl_wait()
    for request, head, query in hl.tile([requests, kv_heads, queries], block_size=[1, 1, 1]):
        limit = seq_lens[request.begin] - queries + 1 + query.begin
        first = torch.where(limit * 0 + window > 0, torch.clamp(limit - window, min=0), limit * 0)
        x = multiplied(rows[request.begin, query.begin, head.begin, :, :], kv_cache.dtype)
        if sinks is not None:
            m = scores[head.begin, :].to(torch.float32) * LOG2E
            total = hl.full([group], 1.0, dtype=torch.float32)
        else:
            m = hl.full([group], float("-inf"), dtype=torch.float32)
            total = hl.full([group], 0.0, dtype=torch.float32)
        cap = hl.full([group], 0.0, dtype=torch.float32) + softcap
        acc = hl.zeros([group, dim], dtype=torch.float32)
        for token in hl.tile(first, limit):
            at = token.index
            block = block_table[request.begin, at // page].to(torch.int64)
            place = block * block_stride + at % page * slot_stride + head.begin * head_stride
            inside = (at < limit)[:, None]
            k = hl.load(flat, [place[:, None] + hl.arange(dim)[None, :]], extra_mask=inside).to(x.dtype)
            v = hl.load(flat, [place[:, None] + (dim + hl.arange(dim))[None, :]], extra_mask=inside).to(x.dtype)
            s = hl.dot(x, k.T, out_dtype=torch.float32) * (scale * k_scale)
            capped = cap[:, None] * torch.tanh(s / torch.where(cap > 0, cap, 1.0)[:, None])
            s = torch.where(cap[:, None] > 0, capped, s) * LOG2E
            s = torch.where((at < limit)[None, :], s, float("-inf"))
            top = torch.maximum(m, torch.amax(s, -1))
            p = torch.exp2(s - top[:, None])
            alpha = torch.exp2(m - top)
            total = total * alpha + torch.sum(p, -1)
            acc = hl.dot(p.to(x.dtype), v, acc=acc * alpha[:, None])
            m = top
        weight = torch.where(total > 0, v_scale / total, 0.0)
        to[request.begin, query.begin, head.begin, :, :] = (acc * weight[:, None]).to(out.dtype)


KERNEL = paged_attention_decode


def check(_out: torch.Tensor, q: torch.Tensor, kv_cache: torch.Tensor, *others: Any) -> None:
    """ValueError for what the kernel does not take: these become guards of the record."""
    max_queries = others[10]
    if q.size(1) < 1 or q.size(1) > max_queries:
        raise ValueError(f"paged_attention_decode: {q.size(1)} queries; the kernel takes 1 to {max_queries}")
    if kv_cache.stride(3) != 1:
        raise ValueError(f"paged_attention_decode: K and V of a head have the stride {kv_cache.stride(3)}; the kernel takes 1")


def candidates(sizes: dict[str, int], _variant: Variant) -> list[dict[str, Any]]:
    """Configs worth measuring: 32 to 128 tokens at a time, as many of them under way as shared memory holds."""
    tokens = (32,) if sizes["K"] >= 256 else (64, 32, 128)
    common = {"indexing": "pointer", "pid_type": "flat"}
    return [{"block_sizes": [n], "num_warps": w, "num_stages": s, **common} for n in tokens for w, s in ((4, 3), (4, 2), (8, 2))]
