"""fused_qk_norm_rope: RMS norm of each q and k head, then rotary_embedding, in place in rows of q, k and v; as in vLLM."""

from __future__ import annotations

from typing import Any

import torch
from hdispatch.errors import ArgumentError
from hdispatch.opspec import BoolArg, FloatArg, IntArg, OpSpec, TensorArg, Variant, VllmOp

from ..lib.indices import check_indices
from ..lib.model_sizes import qkv, rows
from ..lib.reference_fp8 import random_rows
from ..lib.reference_norm import normalized, random_weight
from ..lib.rope import check_rotary, foreign_key, random_cache, random_positions, rotated, split_heads

NAME = "fused_qk_norm_rope"


def reference(
    qkv: torch.Tensor,
    num_heads_q: int,
    num_heads_k: int,
    num_heads_v: int,
    head_dim: int,
    eps: float,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    is_neox: bool,
    position_ids: torch.Tensor,
    forced_token_heads_per_warp: int = -1,  # noqa: ARG001 -- vLLM's hint to its own kernel
) -> None:
    """The op in torch.

    qkv            bfloat16 or float16 [M, K], K = (num_heads_q + num_heads_k + num_heads_v) * head_dim: the heads of q and k
                   are normalized and rotated in place, those of v stay as they are
    eps            added to the mean of the squares, at least 0
    q_weight       [head_dim], dtype of qkv; of every q head
    k_weight       likewise
    cos_sin_cache  bfloat16, float16 or float32 [positions, R], R even and at most head_dim: R / 2 cosines, then R / 2 sines
    is_neox        pairs are elements i and i + R / 2 of a head if set, 2 * i and 2 * i + 1 if not
    position_ids   int64 [M], rows of cos_sin_cache
    forced_token_heads_per_warp  ignored

    x = head * rsqrt(mean(head * head) + eps) * weight, of whose first R elements each pair (a, b) becomes
    (a * cos - b * sin, b * cos + a * sin): float32 throughout, rounded once.
    """
    _check(qkv, (num_heads_q, num_heads_k, num_heads_v), head_dim, (q_weight, k_weight), cos_sin_cache)
    check_indices(NAME, "position_ids", position_ids, cos_sin_cache.size(0), "cos_sin_cache")
    heads = qkv.unflatten(1, (qkv.size(1) // head_dim, head_dim))
    rotary = cos_sin_cache.size(1)
    cos, sin = cos_sin_cache[position_ids].float().unsqueeze(1).chunk(2, dim=-1)
    for first, count, weight in ((0, num_heads_q, q_weight), (num_heads_q, num_heads_k, k_weight)):
        x = normalized(heads[:, first : first + count].float(), weight, eps)
        x[..., :rotary] = rotated(x[..., :rotary], cos, sin, is_neox)
        heads[:, first : first + count] = x


def _check(
    qkv: torch.Tensor, counts: tuple[int, int, int], head_dim: int, weights: tuple[torch.Tensor, ...], cache: torch.Tensor
) -> None:
    """What the declaration cannot say."""
    if qkv.size(1) != sum(counts) * head_dim:
        raise ArgumentError(f"{NAME}: qkv has rows of {qkv.size(1)} elements; expected {counts} heads of {head_dim}")
    if any(weight.size(0) != head_dim for weight in weights):
        raise ArgumentError(f"{NAME}: weights have {[weight.size(0) for weight in weights]} elements; expected {head_dim}")
    check_rotary(NAME, cache, head_dim)


def sample(variant: Variant, sizes: dict[str, int], device: torch.device, generator: torch.Generator) -> list[Any]:
    """Random arguments, all elements of the heads rotated. `OpSpec` says the rest; K is a multiple of head_dim."""
    m, k, dtype, dim = sizes["M"], sizes["K"], variant.dtypes["qkv"], int(variant.static["head_dim"])
    q_heads, k_heads = split_heads(k, dim)
    return [
        random_rows(m, k, dtype, device, generator),
        q_heads,
        k_heads,
        k // dim - q_heads - k_heads,
        dim,
        1e-6,
        random_weight(dim, dtype, device, generator),
        random_weight(dim, dtype, device, generator),
        random_cache(dim, variant.dtypes["cos_sin_cache"], device, generator),
        variant.static["is_neox"],
        random_positions(m, device, generator),
        -1,
    ]


def served(variant: Variant) -> bool:
    """Caches are of the dtype of qkv, or float32."""
    return variant.dtypes["cos_sin_cache"] in (variant.dtypes["qkv"], torch.float32)


SPEC = OpSpec(
    name=NAME,
    args=(
        TensorArg("qkv", ("M", "K"), (torch.bfloat16, torch.float16), mutated=True),
        IntArg("num_heads_q", minimum=0),
        IntArg("num_heads_k", minimum=0),
        IntArg("num_heads_v", minimum=0),
        IntArg("head_dim", values=(128, 64, 256), minimum=1),
        FloatArg("eps", minimum=0.0),
        TensorArg("q_weight", ("*",), "qkv"),
        TensorArg("k_weight", ("*",), "qkv"),
        TensorArg("cos_sin_cache", ("*", "*"), (torch.bfloat16, torch.float16, torch.float32)),
        BoolArg("is_neox", values=(True, False)),
        TensorArg("position_ids", ("M",), (torch.int64,)),
        IntArg("forced_token_heads_per_warp", default=-1),
    ),
    reference=reference,
    sample=sample,
    shapes=(*rows(qkv), {}),
    calls=qkv,
    config_key={"hidden_size": "K", "num_tokens": "M"},
    foreign_key=foreign_key,
    served=served,
    vllm=VllmOp(NAME),
)
