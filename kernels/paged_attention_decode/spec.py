"""paged_attention_decode: attention of the newest tokens of each request, one to eight of them, over a paged KV cache."""

from __future__ import annotations

from typing import Any

import torch
from hdispatch.errors import ArgumentError
from hdispatch.opspec import FloatArg, IntArg, OpSpec, TensorArg, Variant

from ..lib.paged_kv import DECODE, LENGTHS, Rule, attend, check_blocks, random_lengths, random_paged, softmax_scale
from ..lib.reference_fp8 import FP8

NAME = "paged_attention_decode"

#: Tokens of the longest request of a sample call, unless it is asked for, and of a block of its cache.
LONGEST, PAGE = 100, 16


def reference(
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
) -> None:
    """The op in torch.

    out          [M, queries, N, K], dtype of q, written; like q, [M, N, K] for one query per request
    q            bfloat16 or float16 [M, queries, N, K], last dimension contiguous: queries of the newest tokens of each
                 request, the last one that of token seq_lens - 1; each sees the tokens up to its own
    kv_cache     [blocks, N / group, page, 2 * K], dtype of q or float8_e4m3fn, any strides but the last: K, then V
    block_table  int32 [M, columns]: the blocks of each request's tokens
    seq_lens     int32 [M]: tokens of each request, the new ones included; 0 gives zeros
    sinks        [N], dtype of q: a score for each head that takes part in the softmax and has no value; or None
    max_seq_len  at least the largest of seq_lens
    scale        factor of q k^T
    softcap      c > 0: scores s become c * tanh(s / c); 0: they stay
    window       w > 0: a query sees the newest w tokens up to its own; 0: all of them
    k_scale      factor of K, v_scale of V: 1 but for fp8 caches
    group        query heads per kv head
    max_queries  1, 4 or 8: queries is at most this

    Scores, softmax and sums are float32. fp8 caches are multiplied in float16, as which q is taken then.
    """
    queries, heads, kv_heads = _queries(q), q.size(-2), kv_cache.size(1)
    if kv_heads * group != heads:
        raise ArgumentError(f"{NAME}: kv_cache has {kv_heads} heads; expected {heads} query heads / group, which is {group}")
    if queries.size(1) > max_queries:
        raise ArgumentError(f"{NAME}: {queries.size(1)} queries per request; expected at most max_queries, {max_queries}")
    check_blocks(NAME, kv_cache, block_table, seq_lens, max_seq_len)
    rule = Rule(scale * k_scale, softcap, window, sinks)
    y = attend(queries.float(), kv_cache, block_table, seq_lens.clamp(min=0), max_seq_len, rule)
    out.copy_((y * v_scale).view(out.shape))


def _queries(q: torch.Tensor) -> torch.Tensor:
    """q as [M, queries, N, K]."""
    return q if q.dim() == 4 else q.unsqueeze(1)


def sample(variant: Variant, sizes: dict[str, int], device: torch.device, generator: torch.Generator) -> list[Any]:
    """Random arguments, of every request as many queries as may be; `OpSpec` says the rest."""
    m, dim, dtype = sizes["M"], sizes["K"], variant.dtypes["q"]
    group, queries = int(variant.static["group"]), int(variant.static["max_queries"])
    kv_heads = max(1, sizes["N"] // group)
    heads = kv_heads * group
    longest = sizes.get("max_seq_len", LONGEST)
    lengths = random_lengths(m, longest, generator, bool(sizes.get("equal"))).clamp(min=queries)
    paged = random_paged(lengths, kv_heads, dim, PAGE, variant.dtypes["kv_cache"], device, generator)
    q = torch.randn(m, queries, heads, dim, generator=generator, device=generator.device).to(device=device, dtype=dtype)
    sinks = None
    if "sinks" in variant.dtypes:
        sinks = torch.randn(heads, generator=generator, device=generator.device).to(device=device, dtype=dtype)
    scales = (0.5, 0.25) if variant.dtypes["kv_cache"] == FP8 else (1.0, 1.0)
    return [
        torch.full_like(q, float("nan")),
        q,
        paged.kv_cache,
        paged.block_table,
        paged.seq_lens,
        sinks,
        longest,
        softmax_scale(dim),
        0.0,
        0,
        *scales,
        group,
        queries,
    ]


def served(variant: Variant) -> bool:
    """bfloat16, with one query per request or, for speculation, up to 4; one variant with fp8 caches. The rest on request."""
    dtypes, group, queries = variant.dtypes, variant.static["group"], variant.static["max_queries"]
    if dtypes["q"] != torch.bfloat16 or "sinks" in dtypes:
        return False
    if dtypes["kv_cache"] == FP8:
        return group == 4 and queries == 1
    return dtypes["kv_cache"] == dtypes["q"] and group in {1: (2, 4, 8), 4: (2, 4, 8)}.get(queries, ())


SPEC = OpSpec(
    name=NAME,
    args=(
        TensorArg("out", ("M", "*", "N", "K"), "q", mutated=True, layout="rows", pad=True),
        TensorArg("q", ("M", "*", "N", "K"), (torch.bfloat16, torch.float16), layout="any", multiple=16, pad=True),
        TensorArg("kv_cache", ("*", "N/group", "*", "2*K"), (torch.bfloat16, torch.float16, FP8), layout="any", multiple=16),
        TensorArg("block_table", ("M", "*"), (torch.int32,), layout="rows"),
        TensorArg("seq_lens", ("M",), (torch.int32,)),
        TensorArg("sinks", ("N",), "q", optional=True),
        IntArg("max_seq_len", minimum=1, ladder=LENGTHS),
        FloatArg("scale", minimum=0.0),
        FloatArg("softcap", minimum=0.0),
        IntArg("window", minimum=0),
        FloatArg("k_scale", minimum=0.0),
        FloatArg("v_scale", minimum=0.0),
        IntArg("group", values=(4, 8, 2, 1, 5, 7, 16), minimum=1),
        IntArg("max_queries", values=(1, 4, 8), minimum=1),
    ),
    reference=reference,
    sample=sample,
    **DECODE,
    served=served,
    typical="bfloat16-bfloat16+group=4+max_queries=1",
)
