"""attention_half: q/k norm, rope, the write to the KV cache and attention of one new token per request, in one launch."""

from __future__ import annotations

from typing import Any

import torch
from hdispatch.errors import ArgumentError
from hdispatch.opspec import BoolArg, FloatArg, IntArg, OpSpec, TensorArg, Variant

from ..lib.indices import check_indices
from ..lib.paged_kv import (
    DECODE,
    LENGTHS,
    Rule,
    attend,
    check_blocks,
    check_slots,
    random_lengths,
    random_paged,
    softmax_scale,
    write,
)
from ..lib.reference_fp8 import random_rows
from ..lib.reference_norm import normalized, random_weight
from ..lib.rope import SAMPLE_POSITIONS, check_rotary, random_cache, rotated

NAME = "attention_half"

#: Tokens of the longest request of a sample call, unless it is asked for, and of a block of its cache.
LONGEST, PAGE = 100, 16


def reference(
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
    max_seq_len: int,
    scale: float,
    eps: float,
    group: int,
    is_neox: bool = True,
) -> None:
    """The op in torch, for a step in which every request has one new token.

    out            [M, N, K], dtype of qkv, written: the attention's output of N query heads of K elements
    qkv            bfloat16 or float16 [M, (N + 2 * N / group) * K]: the heads of q, k and v of each request's new token
    q_weight       [K], dtype of qkv: of the RMS norm of every q head; or None: no norm
    k_weight       likewise of every k head
    cos_sin_cache  bfloat16, float16 or float32 [positions, R], R even and at most K: R / 2 cosines, then R / 2 sines
    positions      int64 [M], rows of cos_sin_cache
    slot_mapping   int64 [M]: the new token's place, block * page + place in the block, as block_table has it; of a
                   negative one nothing is written
    kv_cache       [blocks, N / group, page, 2 * K], dtype of qkv, any strides but the last: K, then V; the new token's are
                   written
    block_table    int32 [M, columns]: the blocks of each request's tokens
    seq_lens       int32 [M]: tokens of each request, the new one included; 1 if less
    max_seq_len    at least the largest of seq_lens
    scale          factor of q k^T
    eps            added to the mean of the squares, at least 0
    group          query heads per kv head
    is_neox        pairs are elements i and i + R / 2 of a head if set, 2 * i and 2 * i + 1 if not

    q and k are normalized and rotated as by fused_qk_norm_rope, in float32, and rounded once; the new token takes part with
    the k and v that the cache gets. Scores, softmax and sums are float32.
    """
    heads, dim = out.shape[1:]
    kv_heads = heads // group
    _check(qkv, heads, kv_heads, dim, cos_sin_cache, kv_cache)
    old = (seq_lens - 1).clamp(min=0)
    check_indices(NAME, "positions", positions, cos_sin_cache.size(0), "cos_sin_cache")
    check_slots(NAME, slot_mapping, kv_cache.size(0), kv_cache.size(2))
    check_blocks(NAME, kv_cache, block_table, old, max_seq_len - 1)
    x = qkv.unflatten(1, (heads + 2 * kv_heads, dim))
    cos, sin = cos_sin_cache[positions].float().unsqueeze(1).chunk(2, dim=-1)
    turned = []
    for some, weight in ((x[:, :heads], q_weight), (x[:, heads : heads + kv_heads], k_weight)):
        y = some.float() if weight is None else normalized(some.float(), weight, eps)
        rotary = cos_sin_cache.size(1)
        y = torch.cat((rotated(y[..., :rotary], cos, sin, is_neox), y[..., rotary:]), dim=-1)
        turned.append(y.to(qkv.dtype))
    (q, k), v = turned, x[:, heads + kv_heads :]
    write(kv_cache, slot_mapping, torch.cat((k, v), dim=-1))
    out.copy_(attend(q.unsqueeze(1), kv_cache, block_table, old, max_seq_len - 1, Rule(scale), (k, v)).squeeze(1))


def _check(
    qkv: torch.Tensor,
    heads: int,
    kv_heads: int,
    dim: int,
    cos_sin_cache: torch.Tensor,
    kv_cache: torch.Tensor,
) -> None:
    """What the declaration cannot say."""
    if qkv.size(1) != (heads + 2 * kv_heads) * dim:
        raise ArgumentError(f"{NAME}: qkv has rows of {qkv.size(1)} elements; expected {heads} + 2 * {kv_heads} heads of {dim}")
    if kv_cache.size(1) != kv_heads or kv_heads * (heads // max(kv_heads, 1)) != heads:
        raise ArgumentError(f"{NAME}: kv_cache has {kv_cache.size(1)} heads; expected {heads} query heads / group")
    check_rotary(NAME, cos_sin_cache, dim)


def sample(variant: Variant, sizes: dict[str, int], device: torch.device, generator: torch.Generator) -> list[Any]:
    """Random arguments, all elements of the heads rotated; `OpSpec` says the rest."""
    m, dim, dtype, group = sizes["M"], sizes["K"], variant.dtypes["qkv"], int(variant.static["group"])
    kv_heads = max(1, sizes["N"] // group)
    heads = kv_heads * group
    longest = sizes.get("max_seq_len", LONGEST)
    lengths = random_lengths(m, longest, generator, bool(sizes.get("equal")))
    paged = random_paged(lengths, kv_heads, dim, PAGE, dtype, device, generator)
    weights = [
        random_weight(dim, dtype, device, generator) if name in variant.dtypes else None for name in ("q_weight", "k_weight")
    ]
    return [
        torch.full((m, heads, dim), float("nan"), dtype=dtype, device=device),
        random_rows(m, (heads + 2 * kv_heads) * dim, dtype, device, generator),
        *weights,
        random_cache(dim, variant.dtypes["cos_sin_cache"], device, generator, max(SAMPLE_POSITIONS, longest)),
        (lengths - 1).to(device),
        paged.slots,
        paged.kv_cache,
        paged.block_table,
        paged.seq_lens,
        longest,
        softmax_scale(dim),
        1e-6,
        group,
        bool(variant.static["is_neox"]),
    ]


def served(variant: Variant) -> bool:
    """bfloat16; the groups of Qwen3 with both norms, those of Llama, Mistral and Qwen2.5 with none. The rest on request."""
    dtypes = variant.dtypes
    if ("q_weight" in dtypes) != ("k_weight" in dtypes) or {dtypes["qkv"], dtypes["cos_sin_cache"]} != {torch.bfloat16}:
        return False
    return variant.static["group"] in ((2, 4, 5, 8) if "q_weight" in dtypes else (4, 5, 7, 8))


SPEC = OpSpec(
    name=NAME,
    args=(
        TensorArg("out", ("M", "N", "K"), "qkv", mutated=True, layout="rows"),
        TensorArg("qkv", ("M", "*"), (torch.bfloat16, torch.float16), layout="rows"),
        TensorArg("q_weight", ("K",), "qkv", optional=True),
        TensorArg("k_weight", ("K",), "qkv", optional=True),
        TensorArg("cos_sin_cache", ("*", "*"), (torch.bfloat16, torch.float16, torch.float32)),
        TensorArg("positions", ("M",), (torch.int64,)),
        TensorArg("slot_mapping", ("M",), (torch.int64,)),
        TensorArg("kv_cache", ("*", "N/group", "*", "2*K"), "qkv", mutated=True, layout="any", multiple=16),
        TensorArg("block_table", ("M", "*"), (torch.int32,), layout="rows"),
        TensorArg("seq_lens", ("M",), (torch.int32,)),
        IntArg("max_seq_len", minimum=1, ladder=LENGTHS),
        FloatArg("scale", minimum=0.0),
        FloatArg("eps", minimum=0.0),
        IntArg("group", values=(4, 8, 2, 1, 5, 7, 16), minimum=1),
        BoolArg("is_neox", values=(True,), default=True),
    ),
    reference=reference,
    sample=sample,
    **DECODE,
    served=served,
    typical="bfloat16-bfloat16+q_weight+k_weight+group=4",
)
