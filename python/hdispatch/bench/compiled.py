"""The ops as plain torch functions that return their results: what torch.compile is given, as in the post's baseline.

Each takes the op's own arguments in the op's order; those that the op only writes are not read. Shapes and dtypes are
those of the op, and a tensor that the op writes in place comes back as a new one. GEMMs have no such function.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
MIN_SCALE = 1.0 / (FP8_MAX * 512.0)
Function = Callable[..., Any]

#: Options of torch.compile in the post.
OPTIONS: dict[str, bool] = {
    "enable_auto_functionalized_v2": False,
    "size_asserts": False,
    "alignment_asserts": False,
    "scalar_asserts": False,
    "combo_kernels": True,
    "benchmark_combo_kernel": True,
}


def compile_op(op: str) -> Function:
    """The op's function under torch.compile with the post's options; the first call of a shape compiles it.

    Every call of this returns a function of its own: torch keeps what it has compiled by code object, searches it in each
    call and stops at a small number of shapes.
    """
    plain = FUNCTIONS[op]
    assert isinstance(plain, types.FunctionType)
    fresh = types.FunctionType(plain.__code__.replace(), plain.__globals__, plain.__name__, plain.__defaults__)
    compiled: Function = torch.compile(fresh, fullgraph=True, dynamic=False, options=dict(OPTIONS))
    return compiled


# ---- shared steps ----


def _quantized(x: Tensor, scale: Tensor) -> Tensor:
    return (x / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8)


def _by_rows(x: Tensor, scale_ub: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rows of float32 x [M, K] in fp8, and their scales [M, 1]."""
    absmax = x.abs().amax(dim=-1, keepdim=True)
    if scale_ub is not None:
        absmax = torch.minimum(absmax, scale_ub)
    scale = (absmax / FP8_MAX).clamp(min=MIN_SCALE)
    return _quantized(x, scale), scale


def _by_groups(x: Tensor, group_size: int, transposed: bool, scale_of: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Groups of the rows of float32 x [M, K] in fp8, and their scales [M, K / group_size]; column-major if transposed."""
    groups = x.reshape(x.shape[0], -1, group_size)
    scale = scale_of(groups.abs().amax(dim=-1))
    codes = _quantized(groups, scale.unsqueeze(-1)).flatten(-2)
    return codes, scale.t().contiguous().t() if transposed else scale


def _bounded(scale: Tensor, scale_ue8m0: bool) -> Tensor:
    scale = scale.clamp(min=MIN_SCALE)
    return _power_of_two(scale) if scale_ue8m0 else scale


def _power_of_two(scale: Tensor) -> Tensor:
    """Rounded up: the exponent goes up if the mantissa is not 0."""
    bits = scale.clamp(min=1e-10).view(torch.int32)
    return ((bits + 0x007FFFFF) & 0x7F800000).view(torch.float32)


def _rstd(x: Tensor, epsilon: float) -> Tensor:
    return torch.rsqrt((x * x).mean(dim=-1, keepdim=True) + epsilon)


def _normalized(input: Tensor, weight: Tensor, epsilon: float, residual: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The norm before quantization in float32, rounded as in vLLM; and the new residual if there is one."""
    x = input.float()
    if residual is not None:
        x = x + residual.float()
    y = ((x * _rstd(x, epsilon)).to(input.dtype) * weight).float()
    return y, () if residual is None else (x.to(input.dtype),)


def _activated(input: Tensor) -> Tensor:
    gate, up = input.float().chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def _rotated(x: Tensor, positions: Tensor, cos_sin_cache: Tensor, is_neox: bool, offset: int, inverse: bool) -> Tensor:
    """Rotary embedding of float32 x [M, heads, head_size]."""
    cos, sin = cos_sin_cache[positions].float().unsqueeze(1).chunk(2, dim=-1)
    if inverse:
        sin = -sin
    end = offset + cos_sin_cache.shape[-1]
    part = x[..., offset:end]
    a, b = part.chunk(2, dim=-1) if is_neox else (part[..., ::2], part[..., 1::2])
    halves = (a * cos - b * sin, b * cos + a * sin)
    turned = torch.cat(halves, dim=-1) if is_neox else torch.stack(halves, dim=-1).flatten(-2)
    if x.shape[-1] == cos_sin_cache.shape[-1]:
        return turned
    return torch.cat((x[..., :offset], turned, x[..., end:]), dim=-1)


# ---- ops ----


def rms_norm(_result: Tensor, input: Tensor, weight: Tensor | None, epsilon: float) -> Tensor:
    """One rounding, as in vLLM's kernel."""
    x = input.float()
    y = x * _rstd(x, epsilon)
    return (y if weight is None else y * weight.float()).to(input.dtype)


def fused_add_rms_norm(input: Tensor, residual: Tensor, weight: Tensor | None, epsilon: float) -> tuple[Tensor, Tensor]:
    """The normalized sum and the sum."""
    total = input + residual
    x = total.float()
    y = x * _rstd(x, epsilon)
    return (y if weight is None else y * weight.float()).to(input.dtype), total


def silu_and_mul(_result: Tensor, input: Tensor) -> Tensor:
    """Activation of gate times up."""
    return _activated(input).to(input.dtype)


def static_scaled_fp8_quant(_result: Tensor, input: Tensor, scale: Tensor, _group_shape: None = None) -> Tensor:
    """One scale, given."""
    return (input.float() * scale.reciprocal()).clamp(-FP8_MAX, FP8_MAX).to(FP8)


def dynamic_scaled_fp8_quant(_result: Tensor, input: Tensor, _scale: Tensor) -> tuple[Tensor, Tensor]:
    """One scale, of the whole tensor."""
    x = input.float()
    scale = (x.abs().amax() / FP8_MAX).clamp(min=MIN_SCALE).reshape(1)
    return _quantized(x, scale), scale


def dynamic_per_token_scaled_fp8_quant(
    _result: Tensor, input: Tensor, _scale: Tensor, scale_ub: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """A scale per row."""
    return _by_rows(input.float(), scale_ub)


def rms_norm_dynamic_per_token_quant(
    _result: Tensor,
    input: Tensor,
    weight: Tensor,
    _scale: Tensor,
    epsilon: float,
    scale_ub: Tensor | None = None,
    residual: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Codes, scales, and the new residual if there is one."""
    y, rest = _normalized(input, weight, epsilon, residual)
    return *_by_rows(y, scale_ub), *rest


def silu_and_mul_dynamic_per_token_quant(
    _result: Tensor, input: Tensor, _scale: Tensor, scale_ub: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Codes and scales."""
    return _by_rows(_activated(input), scale_ub)


def rms_norm_per_block_quant(
    _result: Tensor,
    input: Tensor,
    weight: Tensor,
    _scale: Tensor,
    epsilon: float,
    scale_ub: Tensor | None,
    residual: Tensor | None,
    group_size: int,
    is_scale_transposed: bool,
    scale_ue8m0: bool = False,
) -> tuple[Tensor, ...]:
    """Codes, scales, and the new residual if there is one."""
    y, rest = _normalized(input, weight, epsilon, residual)

    def scale_of(absmax: Tensor) -> Tensor:
        absmax = absmax if scale_ub is None else torch.minimum(absmax, scale_ub)
        return _bounded(absmax / FP8_MAX, scale_ue8m0)

    return *_by_groups(y, group_size, is_scale_transposed, scale_of), *rest


def silu_and_mul_per_block_quant(
    _out: Tensor,
    input: Tensor,
    _scales: Tensor,
    group_size: int,
    scale_ub: Tensor | None = None,
    is_scale_transposed: bool = False,
    scale_ue8m0: bool = False,
) -> tuple[Tensor, Tensor]:
    """Codes and scales; scale_ub bounds the scale."""

    def scale_of(absmax: Tensor) -> Tensor:
        scale = absmax / FP8_MAX
        return _bounded(scale if scale_ub is None else torch.minimum(scale, scale_ub), scale_ue8m0)

    return _by_groups(_activated(input), group_size, is_scale_transposed, scale_of)


def per_token_group_fp8_quant(
    input: Tensor,
    _output_q: Tensor,
    output_s: Tensor,
    group_size: int,
    eps: float,
    _fp8_min: float,
    _fp8_max: float,
    scale_ue8m0: bool = False,
    _transposed: bool = False,
    _aligned: bool = False,
) -> tuple[Tensor, Tensor]:
    """Codes and scales; the layout of the scales is that of output_s, which is asked for its strides and not read."""

    def scale_of(absmax: Tensor) -> Tensor:
        scale = absmax.clamp(min=eps) / FP8_MAX
        return _power_of_two(scale) if scale_ue8m0 else scale

    return _by_groups(input.float(), group_size, output_s.stride(0) < output_s.stride(1), scale_of)


def per_token_group_fp8_quant_packed(
    input: Tensor,
    _output_q: Tensor,
    _output_s_packed: Tensor,
    group_size: int,
    eps: float,
    _fp8_min: float,
    _fp8_max: float,
) -> tuple[Tensor, Tensor]:
    """Codes, and four exponents to an int32, column-major."""
    codes, scale = _by_groups(input.float(), group_size, False, lambda s: _power_of_two(s.clamp(min=eps) / FP8_MAX))
    exponents = scale.view(torch.int32) >> 23
    exponents = torch.nn.functional.pad(exponents, (0, -exponents.shape[-1] % 4)).reshape(codes.shape[0], -1, 4)
    shifts = torch.arange(0, 32, 8, device=input.device, dtype=torch.int32)
    return codes, (exponents << shifts).sum(dim=-1, dtype=torch.int32).t().contiguous().t()


def rotary_embedding(
    positions: Tensor,
    query: Tensor,
    key: Tensor | None,
    head_size: int,
    cos_sin_cache: Tensor,
    is_neox: bool,
    rope_dim_offset: int = 0,
    inverse: bool = False,
) -> tuple[Tensor, ...]:
    """Query and key, rotated."""
    at = positions.flatten()

    def turned(x: Tensor) -> Tensor:
        heads = x.reshape(at.shape[0], -1, head_size).float()
        return _rotated(heads, at, cos_sin_cache, is_neox, rope_dim_offset, inverse).to(x.dtype).reshape(x.shape)

    return tuple(turned(x) for x in (query, key) if x is not None)


def fused_qk_norm_rope(
    qkv: Tensor,
    num_heads_q: int,
    num_heads_k: int,
    _num_heads_v: int,
    head_dim: int,
    eps: float,
    q_weight: Tensor,
    k_weight: Tensor,
    cos_sin_cache: Tensor,
    is_neox: bool,
    position_ids: Tensor,
    _forced_token_heads_per_warp: int = -1,
) -> tuple[Tensor, Tensor]:
    """The heads of q and of k, normalized and rotated, [M, heads * head_dim] each; v, which the op leaves alone, is not."""

    def turned(first: int, heads: int, weight: Tensor) -> Tensor:
        x = qkv[:, first * head_dim : (first + heads) * head_dim].reshape(-1, heads, head_dim).float()
        y = x * _rstd(x, eps) * weight.float()
        return _rotated(y, position_ids, cos_sin_cache, is_neox, 0, False).to(qkv.dtype).flatten(1)

    return turned(0, num_heads_q, q_weight), turned(num_heads_q, num_heads_k, k_weight)


#: by name of the op
FUNCTIONS: dict[str, Function] = {
    each.__name__: each
    for each in (
        rms_norm,
        fused_add_rms_norm,
        silu_and_mul,
        static_scaled_fp8_quant,
        dynamic_scaled_fp8_quant,
        dynamic_per_token_scaled_fp8_quant,
        rms_norm_dynamic_per_token_quant,
        silu_and_mul_dynamic_per_token_quant,
        rms_norm_per_block_quant,
        silu_and_mul_per_block_quant,
        per_token_group_fp8_quant,
        per_token_group_fp8_quant_packed,
        rotary_embedding,
        fused_qk_norm_rope,
    )
}
