"""The Helion kernel of fused_qk_norm_rope: some heads of some tokens per program, q and k in one launch."""

from __future__ import annotations

from typing import Any

import helion
import helion.language as hl
import torch
from hdispatch.opspec import Variant

from ..lib import helion_rope as lib
from ..lib.helion_fp8 import release_dependents
from ..lib.helion_rope import pair_strides


# 64-bit offsets: see dynamic_per_token_scaled_fp8_quant.
@helion.kernel(static_shapes=False, index_dtype=torch.int64)
def fused_qk_norm_rope(
    qkv: torch.Tensor, num_heads_q: int, num_heads_k: int, num_heads_v: int, head_dim: hl.constexpr, eps: float,
    q_weight: torch.Tensor, k_weight: torch.Tensor, cos_sin_cache: torch.Tensor, is_neox: hl.constexpr,
    position_ids: torch.Tensor, forced_token_heads_per_warp: int,
) -> None:  # fmt: skip
    m, k = qkv.size()
    k = hl.specialize(k)
    shape, strides = (m, k // head_dim, 2, head_dim // 2), pair_strides(head_dim, is_neox)
    heads = qkv.as_strided(shape, (k, head_dim, *strides))
    # Weights for every head: loaded as such, they get the heads' layout in registers, and no exchange is needed.
    q_weights = q_weight.as_strided(shape, (0, 0, *strides))
    k_weights = k_weight.as_strided(shape, (0, 0, *strides))
    angles = lib.angles_of(cos_sin_cache, head_dim)
    hl.pdl_wait()
    for tokens, head in hl.tile([m, num_heads_q + num_heads_k]):
        a = heads[tokens, head, 0, :].to(torch.float32)
        b = heads[tokens, head, 1, :].to(torch.float32)
        position = position_ids[tokens][:, None] + head.index[None, :] * 0  # likewise
        cos = angles[position, 0, :].to(torch.float32)
        sin = angles[position, 1, :].to(torch.float32)
        release_dependents()
        of_q = (head.index < num_heads_q)[None, :, None]
        rstd = torch.rsqrt(torch.sum(a * a + b * b, dim=-1) * (1.0 / head_dim) + eps)[:, :, None]
        a = a * rstd * torch.where(of_q, q_weights[tokens, head, 0, :], k_weights[tokens, head, 0, :]).to(torch.float32)
        b = b * rstd * torch.where(of_q, q_weights[tokens, head, 1, :], k_weights[tokens, head, 1, :]).to(torch.float32)
        heads[tokens, head, 0, :] = (a * cos - b * sin).to(qkv.dtype)
        heads[tokens, head, 1, :] = (b * cos + a * sin).to(qkv.dtype)


KERNEL = fused_qk_norm_rope


def check(
    qkv: torch.Tensor, num_heads_q: int, num_heads_k: int, num_heads_v: int, head_dim: int, _eps: float,
    q_weight: torch.Tensor, k_weight: torch.Tensor, cos_sin_cache: torch.Tensor, *_: Any,
) -> None:  # fmt: skip
    """ValueError for what the kernel does not take: these become guards of the record."""
    if (num_heads_q + num_heads_k + num_heads_v) * head_dim != qkv.size(1) or num_heads_q + num_heads_k < 1:
        raise ValueError(f"rows of {qkv.size(1)} elements are not {num_heads_q}, {num_heads_k}, … heads of {head_dim}")
    if q_weight.size(0) != head_dim or k_weight.size(0) != head_dim:
        raise ValueError(f"weights are {q_weight.shape} and {k_weight.shape}; heads have {head_dim}")
    lib.check_rotary("fused_qk_norm_rope", cos_sin_cache, head_dim)


def candidates(sizes: dict[str, int], variant: Variant) -> list[dict[str, Any]]:
    """Configs worth measuring."""
    return lib.candidates(sizes["M"], int(variant.static["head_dim"]))
