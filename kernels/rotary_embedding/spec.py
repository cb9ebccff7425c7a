"""rotary_embedding: rotate pairs of elements of each head of query and key by angles of their positions, as the op of vLLM."""

from __future__ import annotations

from typing import Any

import torch
from hdispatch.errors import ArgumentError
from hdispatch.opspec import BoolArg, IntArg, OpSpec, TensorArg, Variant, VllmOp

from ..lib.indices import check_indices
from ..lib.model_sizes import rotary, rows
from ..lib.reference_fp8 import random_rows
from ..lib.rope import random_cache, random_positions, rotated

NAME = "rotary_embedding"


def reference(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor | None,
    head_size: int,
    cos_sin_cache: torch.Tensor,
    is_neox: bool,
    rope_dim_offset: int = 0,
    inverse: bool = False,
) -> None:
    """The op in torch.

    positions        int64, M elements of any shape, rows of cos_sin_cache
    query            bfloat16 or float16 [M, K], rows of K / head_size heads, rotated in place
    key              [M, N] likewise, dtype of query, or None; shares no memory with query
    cos_sin_cache    bfloat16, float16 or float32 [positions, R], R even: R / 2 cosines, then R / 2 sines
    is_neox          pairs are elements i and i + R / 2 of a head if set, 2 * i and 2 * i + 1 if not
    rope_dim_offset  the first of the R elements of a head that are rotated; the others stay as they are
    inverse          rotate by the negative angle

    (a, b) becomes (a * cos - b * sin, b * cos + a * sin): float32, rounded once.

    Several dimensions may stand for M, and heads and head_size for K and N: [batch, length, heads, head_size], where
    strides allow to see that as [M, K]. Called by itself, the reference also takes other strides, and float32.
    """
    rotary = cos_sin_cache.size(1)
    if rotary % 2:
        raise ArgumentError(f"{NAME}: cos_sin_cache has rows of {rotary} elements; expected cosines and as many sines")
    if rope_dim_offset < 0 or rotary + rope_dim_offset > head_size:
        raise ArgumentError(
            f"{NAME}: cos_sin_cache rotates {rotary} elements from rope_dim_offset {rope_dim_offset} on; "
            f"expected at least 0 and at most head_size, {head_size}"
        )
    check_indices(NAME, "positions", positions, cos_sin_cache.size(0), "cos_sin_cache")
    cos, sin = cos_sin_cache[positions.flatten()].float().chunk(2, dim=-1)
    tensors = [tensor for tensor in (query, key) if tensor is not None]
    for tensor, whole in zip(tensors, [_heads(tensor, head_size) for tensor in tensors], strict=True):
        heads = whole[..., rope_dim_offset : rope_dim_offset + rotary]
        leading = 1
        while tensor.shape[:leading].numel() != positions.numel() and leading < tensor.dim():
            leading += 1
        tokens = tensor.shape[:leading]
        angles = (*tokens, *(1 for _ in heads.shape[len(tokens) : -1]), rotary // 2)
        heads.copy_(rotated(heads.float(), cos.view(angles), (-sin if inverse else sin).view(angles), is_neox))


def _heads(tensor: torch.Tensor, head_size: int) -> torch.Tensor:
    """A view with head_size as the last dimension."""
    if tensor.size(-1) % head_size:
        raise ArgumentError(f"{NAME}: rows of {tensor.size(-1)} elements; expected a multiple of head_size, {head_size}")
    return tensor.unflatten(-1, (tensor.size(-1) // head_size, head_size))


def sample(variant: Variant, sizes: dict[str, int], device: torch.device, generator: torch.Generator) -> list[Any]:
    """Random arguments, all elements of the heads rotated; `OpSpec` says the rest."""
    m, dtype, head_size = sizes["M"], variant.dtypes["query"], int(variant.static["head_size"])
    return [
        random_positions(m, device, generator),
        random_rows(m, sizes["K"], dtype, device, generator),
        None if "key" in variant.none else random_rows(m, sizes["N"], dtype, device, generator),
        head_size,
        random_cache(head_size, variant.dtypes["cos_sin_cache"], device, generator),
        *(variant.static[name] for name in ("is_neox", "rope_dim_offset", "inverse")),
    ]


def served(variant: Variant) -> bool:
    """vLLM keeps the cache in the dtype of the query, SGLang in float32."""
    sglang = variant.dtypes["cos_sin_cache"] == torch.float32 and "key" in variant.dtypes and variant.static["is_neox"]
    return variant.dtypes["cos_sin_cache"] == variant.dtypes["query"] or bool(sglang)


SPEC = OpSpec(
    name=NAME,
    args=(
        TensorArg("positions", ("M",), (torch.int64,), flat=True),
        TensorArg("query", ("M", "K"), (torch.bfloat16, torch.float16), mutated=True, layout="rows", merge=True),
        TensorArg("key", ("M", "N"), "query", mutated=True, optional=True, layout="rows", merge=True),
        IntArg("head_size", values=(128, 64, 256), minimum=1),
        TensorArg("cos_sin_cache", ("*", "*"), (torch.bfloat16, torch.float16, torch.float32)),
        BoolArg("is_neox", values=(True, False)),
        IntArg("rope_dim_offset", values=(0,), default=0, minimum=0),
        BoolArg("inverse", values=(False,), default=False),
    ),
    reference=reference,
    sample=sample,
    shapes=(*rows(rotary), {}),
    calls=rotary,
    config_key={"query_size": "K", "key_size": "N", "num_tokens": "M"},
    served=served,
    typical="bfloat16-bfloat16+key+head_size=128+is_neox",
    hints={"N": 1024},
    vllm=VllmOp(NAME),
)
