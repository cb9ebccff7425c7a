"""Attention over K and V that lie in tensors, in plain torch: what attention_dense and attention_varlen declare alike.

q [sequences, heads, queries, head_dim], k and v [sequences, kv heads, keys, head_dim]; packed sequences are padded to that.
Nothing here waits for the GPU.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from hdispatch.errors import ArgumentError
from hdispatch.opspec import BoolArg, FloatArg, IntArg, Variant
from torch.nn.functional import scaled_dot_product_attention

from .model_sizes import head

#: Scores, or elements of padded sequences, that are held at once.
HELD = 2**27
#: Of q, k and v. No kernel takes float32: torch's SDPA serves it.
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
#: Upper edges of the buckets of max_seqlen_q.
LENGTHS = (1, 16, 128, 512, 1024, 2048, 4096, 8192, 16384)
#: Queries of a sample call, unless it is asked for, and query heads per kv head.
LONGEST, GROUP = 100, 4
#: The ops' last arguments: see `Rule`. `limits`: whether softcap and window count.
RULE_ARGS = (
    FloatArg("scale", minimum=0.0),
    FloatArg("softcap", minimum=0.0),
    IntArg("window", minimum=0),
    BoolArg("causal"),
    BoolArg("limits"),
)


class Rule(NamedTuple):
    """What a query sees and how scores become weights: the ops' arguments of these names."""

    scale: float
    softcap: float = 0.0
    window: int = 0
    causal: bool = False


def checked_rule(op: str, scale: float, softcap: float, window: int, causal: bool, limits: bool) -> Rule:
    """The ops' last arguments. ArgumentError for a softcap or window without `limits`."""
    if not limits and (softcap or window):
        raise ArgumentError(f"{op}: softcap is {softcap} and window {window}; without limits both are 0")
    return Rule(scale, softcap, window, causal)


def check_heads(op: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """ArgumentError unless q has a multiple of k's heads, which are dimension 1 of both, and v has k's shape."""
    if q.size(1) % max(1, k.size(1)) or (k.size(1) == 0 and q.size(1)):
        raise ArgumentError(f"{op}: q has {q.size(1)} heads; expected a multiple of k's, which has {k.size(1)}")
    if k.shape != v.shape:
        raise ArgumentError(f"{op}: v is {list(v.shape)}; expected k's shape, {list(k.shape)}")


def sample_heads(heads: int) -> tuple[int, int, int]:
    """Heads of q, k and v of a sample call with so many heads of q."""
    kv_heads = max(1, heads // GROUP) if heads % GROUP == 0 else heads
    return heads, kv_heads, kv_heads


def sample_rule(variant: Variant, dim: int, longest: int) -> tuple[float, float, int, bool, bool]:
    """scale, softcap, window, causal and limits of a sample call, for heads of `dim` and up to `longest` queries."""
    causal, limits = bool(variant.static["causal"]), bool(variant.static["limits"])
    window = 1 + longest // 2 if limits and causal else 0
    return 1 / math.sqrt(dim), (30.0 if limits else 0.0), window, causal, limits


def served(variant: Variant) -> bool:
    """What models have: 16 bits, and a softcap and windows with causal, in bfloat16."""
    if variant.dtypes["q"] == torch.float32:
        return False
    return not variant.static["limits"] or (bool(variant.static["causal"]) and variant.dtypes["q"] == torch.bfloat16)


#: What the declarations of the dense ops say alike, beside RULE_ARGS.
DENSE: dict[str, Any] = {
    "shapes": ({"K": 128}, {"K": 64}, {"K": 256}),
    "calls": head,
    "hints": {"N": 32},
    "own_scales": True,
    "served": served,
    "typical": "bfloat16+causal",
}


class Lengths(NamedTuple):
    """Queries and keys of each sequence where they are padded, int64 [sequences]."""

    queries: torch.Tensor
    keys: torch.Tensor


def seen(queries: int, keys: int, rule: Rule, device: torch.device, lengths: Lengths | None = None) -> torch.Tensor:
    """Which keys a query sees, bool [queries, keys]; with lengths [sequences, 1, queries, keys].

    The last query is that of the last key: FlashAttention's alignment, which is SDPA's where there are as many of both.
    """
    at = torch.arange(keys, device=device)
    position = torch.arange(queries, device=device)[:, None]
    if lengths is not None:
        end = lengths.keys[:, None, None]
        position = position + end - lengths.queries[:, None, None]
    else:
        end = torch.full((), keys, device=device)
        position = position + (keys - queries)
    found = at < end
    if rule.causal:
        found = found & (at <= position)
    if rule.window > 0:
        found = found & (at > position - rule.window)
    found = found.expand(*found.shape[:-2], queries, keys)
    return found if lengths is None else found.unsqueeze(1)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rule: Rule, lengths: Lengths | None = None) -> torch.Tensor:
    """In float32, like q: matrices of scores, a few heads at a time. A query that sees no key gives zeros."""
    sequences, heads, queries, dim = q.shape
    kv_heads, keys = k.size(1), k.size(2)
    if not q.numel():
        return q.float()
    out = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
    step = max(1, HELD // max(1, queries * keys * (heads // kv_heads)))
    for sequence in range(sequences):
        own = None if lengths is None else Lengths(*(each[sequence : sequence + 1] for each in lengths))
        mask = seen(queries, keys, rule, q.device, own).reshape(queries, keys)
        for first in range(0, kv_heads, step):
            some = slice(first, first + step)
            x = q[sequence].view(kv_heads, -1, queries, dim)[some].float()
            y, z = (each[sequence, some].float() for each in (k, v))
            scores = torch.einsum("hgqd,hkd->hgqk", x, y) * rule.scale
            if rule.softcap > 0:
                scores = rule.softcap * torch.tanh(scores / rule.softcap)
            scores = scores.masked_fill(~mask, float("-inf"))
            weights = torch.where(mask.any(-1, keepdim=True), scores, 0.0).softmax(-1)
            weights = torch.where(mask, weights, 0.0)
            out[sequence].view(kv_heads, -1, queries, dim)[some] = torch.einsum("hgqk,hkd->hgqd", weights, z)
    return out


def serve(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rule: Rule, lengths: Lengths | None = None) -> torch.Tensor:
    """What torch's scaled_dot_product_attention makes of it, like q; of a softcap, which it has not, `attend`."""
    queries, keys = q.size(2), k.size(2)
    if rule.softcap > 0 or not q.numel() or not keys:
        return attend(q, k, v, rule, lengths).to(q.dtype)
    q, k, v = (_aligned(each) for each in (q, k, v))
    if lengths is None and rule.window == 0 and (not rule.causal or queries in (1, keys)):
        is_causal = rule.causal and queries > 1
        return scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=rule.scale, enable_gqa=k.size(1) != q.size(1))
    mask = seen(queries, keys, rule, q.device, lengths)
    group = q.size(1) // k.size(1)
    k, v = (each.repeat_interleave(group, 1) if group > 1 else each for each in (k, v))
    y = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=rule.scale)
    return torch.where(mask.any(-1, keepdim=True), y, 0.0)


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy where it is not in vectors of 16 bytes: torch's cuDNN kernel then reads from the address rounded down."""
    steps = [step * x.element_size() % 16 for step, size in zip(x.stride()[:-1], x.shape[:-1], strict=True) if size > 1]
    if x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and not any(steps):
        return x
    return x.clone(memory_format=torch.contiguous_format)


class Packed(NamedTuple):
    """Packed sequences: rows cu_seqlens_q[i] to cu_seqlens_q[i + 1] of q, likewise of k and v, are sequence i's."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    max_seqlen_q: int
    max_seqlen_k: int


def by_padding(out: torch.Tensor, packed: Packed, rule: Rule, *, exact: bool) -> None:
    """Writes the attention of packed sequences, a few of them padded at a time; `exact`: by `attend`, else by `serve`.

    Rows of no sequence stay as they are.
    """
    sequences, tokens = packed.cu_seqlens_q.size(0) - 1, packed.q.size(0)
    queries, keys = min(packed.max_seqlen_q, tokens), min(packed.max_seqlen_k, packed.k.size(0))
    starts = Lengths(*(each[:-1].long() for each in (packed.cu_seqlens_q, packed.cu_seqlens_k)))
    counts = Lengths(*(each.diff().long() for each in (packed.cu_seqlens_q, packed.cu_seqlens_k)))
    row = torch.arange(tokens, device=out.device)
    owner = torch.searchsorted(packed.cu_seqlens_q.long(), row, right=True) - 1
    step = max(1, HELD // max(1, max(queries, keys) * packed.q.size(1) * packed.q.size(2)))
    for first in range(0, sequences, step):
        some = slice(first, first + step)
        start, count = Lengths(*(each[some] for each in starts)), Lengths(*(each[some] for each in counts))
        q = _padded(packed.q, start.queries, count.queries, queries)
        k, v = (_padded(each, start.keys, count.keys, keys) for each in (packed.k, packed.v))
        y = (attend if exact else serve)(q, k, v, rule, count).transpose(1, 2)
        own = (owner - first).clamp(0, len(start.queries) - 1)
        place = row - start.queries[own]
        inside = (owner >= first) & (owner < first + len(start.queries)) & (place >= 0) & (place < queries)
        inside &= row < packed.cu_seqlens_q[-1]
        found = y[own, place.clamp(0, queries - 1)].to(out.dtype)
        out.copy_(torch.where(inside[:, None, None], found, out))


def _padded(x: torch.Tensor, start: torch.Tensor, count: torch.Tensor, longest: int) -> torch.Tensor:
    """[sequences, heads, longest, head_dim] of packed rows; zeros behind a sequence's end."""
    at = torch.arange(longest, device=x.device)
    inside = at < count[:, None]
    rows = torch.where(inside, start[:, None] + at, 0)
    if not x.size(0):
        return x.new_zeros(len(start), x.size(1), longest, x.size(2))
    return torch.where(inside[:, :, None, None], x[rows], 0.0).to(x.dtype).transpose(1, 2)
