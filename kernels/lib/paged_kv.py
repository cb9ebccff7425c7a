"""The paged KV cache in plain torch: attention over it, writes to it, random ones. What the attention ops' references share.

A cache is [blocks, kv heads, page, 2 * head_dim]: of each token and head K, then V, of any strides but the last. A block
table [requests, columns] int32 has the blocks of a request's tokens, `page` tokens in each. Nothing here waits for the GPU.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from hdispatch.errors import ArgumentError
from hdispatch.opspec import Variant, WorkspaceArg

from . import workspace
from .indices import check_indices
from .model_sizes import head

#: Elements of K and V that are gathered at once: requests take turns.
GATHERED = 2**27
#: Upper edges of the buckets of max_seq_len.
LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
#: Elements of the caches that sample calls have at most, on the CPU and on a GPU; requests then share all blocks but the one of
#: their newest token.
SAMPLED, SAMPLED_ON_GPU = 2**22, 2**30
#: Different random numbers in them; an odd number, so that no two tokens are alike.
DRAWN = 2**20 - 3


class Rule(NamedTuple):
    """What a query sees and how scores become weights.

    scale    factor of q k^T
    softcap  c > 0: scores s become c * tanh(s / c)
    window   w > 0: a query sees the newest w tokens up to its own
    sinks    [heads] or None: a score for each head that takes part in the softmax and has no value
    """

    scale: float
    softcap: float = 0.0
    window: int = 0
    sinks: torch.Tensor | None = None


def check_blocks(op: str, kv_cache: torch.Tensor, block_table: torch.Tensor, lengths: torch.Tensor, longest: int) -> None:
    """ArgumentError where a request's tokens are in blocks that the table or the cache has not; on the CPU alone.

    lengths  [requests]: tokens in the cache, of which the first `longest` are read
    """
    if lengths.device.type != "cpu" or not lengths.numel():
        return
    lengths, page = lengths.long().clamp(0, max(longest, 0)), kv_cache.size(2)
    if lengths.any() and not page:
        raise ArgumentError(f"{op}: kv_cache has blocks of no token; expected room for {int(lengths.max())} of a request")
    pages = -(-lengths // max(page, 1))
    if pages.max() > block_table.size(1):
        raise ArgumentError(
            f"{op}: block_table has {block_table.size(1)} columns; expected {int(pages.max())}, for {int(lengths.max())} "
            f"tokens of a request in blocks of {page}"
        )
    used = torch.arange(block_table.size(1)) < pages[:, None]
    check_indices(op, "block_table", block_table[used], kv_cache.size(0), "kv_cache")


def check_slots(op: str, slots: torch.Tensor, blocks: int, page: int) -> None:
    """ArgumentError for a slot behind the cache's last one; on the CPU alone. Negative ones are nowhere."""
    check_indices(op, "slot_mapping", slots.clamp(min=0) if blocks * page else slots[slots >= 0], blocks * page, "the cache")


def attend(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    lengths: torch.Tensor,
    longest: int,
    rule: Rule,
    newest: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Attention in float32, [requests, queries, heads, head_dim] as q.

    q        of any float dtype; the last query of a request is that of its last token, the others precede it
    lengths  int32 [requests]: tokens of each request in the cache, at most `longest`
    newest   K and V [requests, kv heads, head_dim] of one more token per request, which is not read from the cache

    A query that sees no token gives zeros. What the cache and the table hold behind a request's length has no influence.
    """
    page, kv_heads, dim = kv_cache.size(2), kv_cache.size(1), q.size(3)
    pages = min(max(-(-longest // page), 1), block_table.size(1)) if kv_cache.numel() else 0
    out = torch.empty(q.shape, dtype=torch.float32, device=q.device)
    step = max(1, GATHERED // max(1, pages * page * kv_heads * 2 * dim))
    for first in range(0, q.size(0), step):
        some = slice(first, first + step)
        length = lengths[some].long()
        used = torch.arange(pages, device=q.device) * page < length[:, None]
        table = torch.where(used, block_table[some, :pages], 0).long()
        kv = kv_cache[table].float().permute(0, 2, 1, 3, 4).flatten(2, 3)
        at = torch.arange(pages * page, device=q.device)
        kv = torch.where((at < length[:, None])[:, None, :, None], kv, 0.0)
        k, v = kv.split(dim, dim=-1)
        at, count = at.expand(len(length), -1), length
        if newest is not None:
            k, v = (torch.cat((cached, new[some, :, None].float()), 2) for cached, new in zip((k, v), newest, strict=True))
            at = torch.cat((torch.where(at < length[:, None], at, 2**40), length[:, None]), 1)
            count = length + 1
        out[some] = _attend(q[some].float(), k, v, at, count, rule)
    return out


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, at: torch.Tensor, count: torch.Tensor, rule: Rule
) -> torch.Tensor:
    """Of K and V [requests, kv heads, tokens, head_dim] in float32, at positions `at` [requests, tokens]."""
    queries, heads, kv_heads = q.size(1), q.size(2), k.size(1)
    grouped = q.unflatten(2, (kv_heads, heads // kv_heads))
    scores = torch.einsum("rqhgd,rhnd->rqhgn", grouped, k) * rule.scale
    if rule.softcap > 0:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    limit = count[:, None] - queries + 1 + torch.arange(queries, device=q.device)
    seen = at[:, None] < limit[:, :, None]
    if rule.window > 0:
        seen &= at[:, None] >= limit[:, :, None] - rule.window
    seen = seen[:, :, None, None]
    scores = scores.masked_fill(~seen, float("-inf"))
    if rule.sinks is not None:
        sinks = rule.sinks.float().view(kv_heads, -1)[None, None, :, :, None].expand(*scores.shape[:-1], 1)
        weights = torch.cat((scores, sinks), -1).softmax(-1)[..., :-1]
    else:
        weights = torch.where(seen.any(-1, keepdim=True), scores, 0.0).softmax(-1)
    weights = torch.where(seen, weights, 0.0)
    return torch.einsum("rqhgn,rhnd->rqhgd", weights, v).flatten(2, 3)


def eight_kv_heads(variant: Variant) -> dict[str, int]:
    """Sizes at which configs are measured: 8 kv heads, as most models have. How many blocks a call has decides its splits."""
    return {"N": 8 * int(variant.static["group"])}


def workspace_bytes(variant: Variant) -> int:
    """Of a variant's workspace: more query rows have more sums."""
    return workspace.size(int(variant.static["group"]) * int(variant.static.get("max_queries", 1)))


#: What the declarations of decode attention say alike.
DECODE: dict[str, Any] = {
    "shapes": ({"K": 128}, {"K": 64}),
    "calls": head,
    "config_key": {"head_dim": "K", "num_tokens": "M", "max_seq_len": "max_seq_len"},
    "ladder": (1, 2, 4, 8, 16, 32, 64, 128, 256),
    "hints": {"N": 560},  # a multiple of every group
    "measured": eight_kv_heads,
    # Requests of one length leave nothing that a shorter one's blocks could fill: what suits the one may not suit the other.
    "mixes": ({}, {"equal": 1}),
    "workspace": WorkspaceArg("workspace", workspace_bytes),
    "own_scales": True,
}


def write(kv_cache: torch.Tensor, slots: torch.Tensor, kv: torch.Tensor) -> None:
    """kv [tokens, kv heads, n], of the cache's dtype, to the places `slots` [tokens] of kv_cache [blocks, kv heads, page, n].

    Token i goes to block slots[i] // page, place slots[i] % page; of a negative slot nowhere. Slots do not repeat.
    """
    if not len(slots) or not kv_cache.numel():
        return
    page = kv_cache.size(2)
    # Without a mask as index, for which the host would wait: tokens of no place repeat one that has a place, and where none
    # has they write back what is there.
    real = slots >= 0
    stand_in = real.int().argmax().unsqueeze(0)
    slots = torch.where(real, slots, slots.index_select(0, stand_in)).clamp(min=0)
    block, place = slots // page, slots % page
    kv = torch.where(real[:, None, None], kv, kv.index_select(0, stand_in))
    kept = kv_cache[block, :, place]
    kv_cache[block, :, place] = torch.where(real.any(), kv, kept)


class Paged(NamedTuple):
    """A random cache with requests in it. slots: places of the newest token of each request, int64 [requests]."""

    kv_cache: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    slots: torch.Tensor


def random_paged(
    seq_lens: torch.Tensor,
    kv_heads: int,
    dim: int,
    page: int,
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
    most: int | None = None,
) -> Paged:
    """Requests of the given lengths (int64 on the CPU, at least 1), blocks in random order, each token's heads side by side.

    Beyond `most` elements, or those of SAMPLED, requests share all blocks but the one of their newest token.
    """
    if most is None:
        most = SAMPLED if device.type == "cpu" else SAMPLED_ON_GPU
    requests = len(seq_lens)
    longest = int(seq_lens.max()) if requests else 1
    width, last = -(-longest // page), (seq_lens - 1) // page
    blocks = max(1, requests) + max(1, min(requests * (width - 1), most // max(1, kv_heads * page * 2 * dim) - requests))
    order = torch.randperm(blocks, generator=_on_cpu(generator))
    own, shared = order[: max(1, requests)], order[max(1, requests) :]
    table = shared[torch.arange(requests * width) % len(shared)].view(requests, width)
    table.scatter_(1, last[:, None], own[:requests, None])
    # Drawn once for a few millions of elements: more would take longer than what is called with them.
    elements = blocks * page * kv_heads * 2 * dim
    drawn = torch.randn(min(elements, DRAWN), generator=generator, device=generator.device).to(device=device, dtype=dtype)
    kv = drawn.repeat(-(-elements // len(drawn)))[:elements].view(blocks, page, kv_heads, 2 * dim)
    slots = own[:requests] * page + (seq_lens - 1) % page
    return Paged(kv.transpose(1, 2), table.int().to(device), seq_lens.int().to(device), slots.to(device))


def random_lengths(requests: int, longest: int, generator: torch.Generator, equal: bool = False) -> torch.Tensor:
    """Lengths int64 [requests] on the CPU from 1 to `longest`, which the first one has; the second, if any, is 1.

    equal  all are `longest` instead
    """
    if equal:
        return torch.full((requests,), longest)
    lengths = torch.randint(1, longest + 1, (requests,), generator=_on_cpu(generator))
    lengths[:1] = longest
    lengths[1:2] = 1
    return lengths


def _on_cpu(generator: torch.Generator) -> torch.Generator:
    """A generator on the CPU, seeded by one on any device."""
    if generator.device.type == "cpu":
        return generator
    seed = torch.randint(2**31, (1,), generator=generator, device=generator.device)
    return torch.Generator().manual_seed(int(seed))


def softmax_scale(dim: int) -> float:
    """1 / sqrt(dim)."""
    return 1 / math.sqrt(dim)


def random_slots(tokens: int, page: int, device: torch.device, generator: torch.Generator) -> tuple[torch.Tensor, int]:
    """Places int64 [tokens], none twice, the third one negative; and how many blocks of `page` tokens they are in."""
    blocks = -(-tokens // page) + 1
    slots = torch.randperm(blocks * page, generator=_on_cpu(generator))[:tokens]
    slots[2:3] = -1
    return slots.to(device), blocks
