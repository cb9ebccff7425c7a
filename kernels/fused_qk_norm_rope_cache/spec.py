"""fused_qk_norm_rope_cache: q/k norm or none and rope of rows of q, k and v; q in place, k and v to the paged KV cache."""

from __future__ import annotations

from typing import Any

import torch
from hdispatch.errors import ArgumentError
from hdispatch.opspec import BoolArg, FloatArg, IntArg, OpSpec, TensorArg, Variant

from ..lib.indices import check_indices
from ..lib.paged_kv import check_slots, random_slots, write
from ..lib.reference_fp8 import random_rows
from ..lib.reference_norm import normalized, random_weight
from ..lib.rope import check_rotary, foreign_key, random_cache, random_positions, rotated, split_heads

NAME = "fused_qk_norm_rope_cache"

#: Tokens of a block of a sample call's cache.
PAGE = 16


def reference(
    qkv: torch.Tensor,
    num_heads_q: int,
    num_heads_k: int,
    head_dim: int,
    eps: float,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    cos_sin_cache: torch.Tensor,
    is_neox: bool,
    position_ids: torch.Tensor,
    slot_mapping: torch.Tensor,
    kv_cache: torch.Tensor,
) -> None:
    """The op in torch: fused_qk_norm_rope, and its k, with v, to the cache.

    qkv            bfloat16 or float16 [M, K], K = (num_heads_q + 2 * num_heads_k) * head_dim: the heads of q are normalized
                   and rotated in place, those of k and v stay as they are
    eps            added to the mean of the squares, at least 0
    q_weight       [head_dim], dtype of qkv: of every q head; or None: no norm
    k_weight       likewise of every k head
    cos_sin_cache  bfloat16, float16 or float32 [positions, R], R even and at most head_dim: R / 2 cosines, then R / 2 sines
    is_neox        pairs are elements i and i + R / 2 of a head if set, 2 * i and 2 * i + 1 if not
    position_ids   int64 [M], rows of cos_sin_cache
    slot_mapping   int64 [M], no slot twice: token m goes to the place slot % page of the block slot // page; of a negative
                   slot nothing is written
    kv_cache       [blocks, num_heads_k, page, 2 * head_dim], dtype of qkv, any strides but the last: K, normalized and
                   rotated, then V

    float32 throughout, rounded once.
    """
    _check(qkv, num_heads_q, num_heads_k, head_dim, (q_weight, k_weight), cos_sin_cache, kv_cache)
    check_indices(NAME, "position_ids", position_ids, cos_sin_cache.size(0), "cos_sin_cache")
    check_slots(NAME, slot_mapping, kv_cache.size(0), kv_cache.size(2))
    heads = qkv.unflatten(1, (qkv.size(1) // head_dim, head_dim))
    rotary = cos_sin_cache.size(1)
    cos, sin = cos_sin_cache[position_ids].float().unsqueeze(1).chunk(2, dim=-1)
    q, k, v = heads.split((num_heads_q, num_heads_k, num_heads_k), dim=1)
    turned = []
    for some, weight in ((q, q_weight), (k, k_weight)):
        x = some.float() if weight is None else normalized(some.float(), weight, eps)
        turned.append(torch.cat((rotated(x[..., :rotary], cos, sin, is_neox), x[..., rotary:]), dim=-1).to(qkv.dtype))
    q.copy_(turned[0])
    write(kv_cache, slot_mapping, torch.cat((turned[1], v), dim=-1))


def _check(
    qkv: torch.Tensor,
    q_heads: int,
    k_heads: int,
    head_dim: int,
    weights: tuple[torch.Tensor | None, torch.Tensor | None],
    cos_sin_cache: torch.Tensor,
    kv_cache: torch.Tensor,
) -> None:
    """What the declaration cannot say."""
    if qkv.size(1) != (q_heads + 2 * k_heads) * head_dim:
        raise ArgumentError(
            f"{NAME}: qkv has rows of {qkv.size(1)} elements; expected {q_heads} + 2 * {k_heads} heads of {head_dim}"
        )
    if any(weight is not None and weight.size(0) != head_dim for weight in weights):
        raise ArgumentError(f"{NAME}: weights are {[w.shape for w in weights if w is not None]}; expected {head_dim} elements")
    check_rotary(NAME, cos_sin_cache, head_dim)
    if kv_cache.size(1) != k_heads or kv_cache.size(3) != 2 * head_dim:
        raise ArgumentError(f"{NAME}: kv_cache is {list(kv_cache.shape)}; expected [blocks, {k_heads}, page, {2 * head_dim}]")


def sample(variant: Variant, sizes: dict[str, int], device: torch.device, generator: torch.Generator) -> list[Any]:
    """Random arguments, all elements of the heads rotated. `OpSpec` says the rest; K is a multiple of head_dim."""
    m, k, dtype, dim = sizes["M"], sizes["K"], variant.dtypes["qkv"], int(variant.static["head_dim"])
    q_heads, k_heads = split_heads(k, dim)
    slots, blocks = random_slots(m, PAGE, device, generator)
    return [
        random_rows(m, k, dtype, device, generator),
        q_heads,
        k_heads,
        dim,
        1e-6,
        *(
            random_weight(dim, dtype, device, generator) if name in variant.dtypes else None
            for name in ("q_weight", "k_weight")
        ),
        random_cache(dim, variant.dtypes["cos_sin_cache"], device, generator),
        variant.static["is_neox"],
        random_positions(m, device, generator),
        slots,
        torch.zeros(blocks, PAGE, k_heads, 2 * dim, dtype=dtype, device=device).transpose(1, 2),
    ]


def served(variant: Variant) -> bool:
    """Both norms or none, bfloat16, NeoX, heads of attention_half. The rest on request."""
    dtypes, static = variant.dtypes, variant.static
    if ("q_weight" in dtypes) != ("k_weight" in dtypes) or {dtypes["qkv"], dtypes["cos_sin_cache"]} != {torch.bfloat16}:
        return False
    return bool(static["is_neox"]) and static["head_dim"] in (64, 128)


SPEC = OpSpec(
    name=NAME,
    args=(
        TensorArg("qkv", ("M", "K"), (torch.bfloat16, torch.float16), mutated=True, layout="rows"),
        IntArg("num_heads_q", minimum=0),
        IntArg("num_heads_k", minimum=1),
        IntArg("head_dim", values=(128, 64, 256), minimum=1),
        FloatArg("eps", minimum=0.0),
        TensorArg("q_weight", ("*",), "qkv", optional=True),
        TensorArg("k_weight", ("*",), "qkv", optional=True),
        TensorArg("cos_sin_cache", ("*", "*"), (torch.bfloat16, torch.float16, torch.float32)),
        BoolArg("is_neox", values=(True, False)),
        TensorArg("position_ids", ("M",), (torch.int64,)),
        TensorArg("slot_mapping", ("M",), (torch.int64,)),
        TensorArg("kv_cache", ("*", "*", "*", "*"), "qkv", mutated=True, layout="any", multiple=16),
    ),
    reference=reference,
    sample=sample,
    # The kernel divides by nothing of a row's width.
    shapes=({},),
    config_key={"hidden_size": "K", "num_tokens": "M"},
    foreign_key=foreign_key,
    served=served,
    typical="bfloat16-bfloat16+q_weight+k_weight+head_dim=128+is_neox",
)
