"""SGLang's functions in terms of our ops: of each its signature, the arguments of the op that serves it, and its result.

Signatures are those of SGLang 0.5.23; `plugin` leaves a function alone whose own is another. SGLang itself is not imported.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from ... import _C, registry
from ...errors import ArgumentError

#: What SGLang's per-token-group kernels have compiled in: the least max |group|, and the range of fp8.
GROUP_EPS, FP8_MAX = 1e-10, 448.0
#: Rows and columns of weights per scale that scaled_mm_blockwise takes.
BLOCK = [128, 128]


class OpCall(NamedTuple):
    """A call of SGLang's as a call of our op: its arguments, and what SGLang's function returns after it."""

    arguments: tuple[Any, ...]
    result: Any


@dataclass(frozen=True)
class Function:
    """A function of SGLang's that an op serves.

    target  where it is: "module.function" or "module.Class.method", as SGLang's hook registry takes it
    op      our op
    call    has its signature; gives the op's call, or None for what only SGLang's function does
    kernel  the operator by which SGLang's kernel registry knows it; empty where it has none
    """

    target: str
    op: str
    call: Callable[..., OpCall | None]
    kernel: str = ""

    @property
    def is_method(self) -> bool:
        """Whether the target is a method: its first argument is the object, which the op does not need."""
        return self.target.split(".")[-2][0].isupper()

    def make_hook(self) -> Callable[..., Any]:
        """A hook around SGLang's function, `hook(original, *args, **kwargs)`: the table serves the call, or the original does.

        While torch.compile traces, the original is traced, and so serves what it compiled.
        """
        call, attempt, first = self.call, _C.make_attempt(registry.get(self.op)), int(self.is_method)

        def hook(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if not torch.compiler.is_compiling():
                found = call(*args[first:], **kwargs)
                if found is not None and attempt(*found.arguments):
                    return found.result
            return original(*args, **kwargs)

        return hook

    def make_kernel(self) -> Callable[..., Any]:
        """The function served by our op alone, its reference where the table has no row: what the kernel registry gets.

        It raises `ArgumentError` for a call that only SGLang's function takes.
        """
        op = registry.get(self.op)

        @functools.wraps(self.call)
        def kernel(*args: Any, **kwargs: Any) -> Any:
            found = self.call(*args, **kwargs)
            if found is None:
                raise ArgumentError(f"{self.op} does not do what this call of {self.target} asks for; use another backend")
            op(*found.arguments)
            return found.result

        return kernel


def _rmsnorm(
    input: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    out: torch.Tensor | None = None,
    enable_pdl: bool | None = None,  # noqa: ARG001
) -> OpCall:
    result = torch.empty_like(input) if out is None else out
    return OpCall((result, input, weight, eps), result)


def _fused_add_rmsnorm(
    input: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    enable_pdl: bool | None = None,  # noqa: ARG001
) -> OpCall:
    return OpCall((input, residual, weight, eps), None)


def _silu_and_mul(
    input: torch.Tensor,
    out: torch.Tensor | None = None,
    expert_ids: torch.Tensor | None = None,
    expert_step: int = 1,  # noqa: ARG001
    *,
    sorted_token_ids: torch.Tensor | None = None,
    num_tokens_post_padded: torch.Tensor | None = None,  # noqa: ARG001
    num_valid_tokens: int = 0,  # noqa: ARG001
) -> OpCall | None:
    if expert_ids is not None or sorted_token_ids is not None:  # rows of experts that are elsewhere are left out
        return None
    result = input.new_empty(*input.shape[:-1], input.shape[-1] // 2) if out is None else out
    return OpCall((result, input), result)


def _sgl_per_token_quant_fp8(input: torch.Tensor, output_q: torch.Tensor, output_s: torch.Tensor) -> OpCall:
    return OpCall((output_q, input, output_s, None), None)


def _per_token_group_quant(
    input: torch.Tensor,
    output_q: torch.Tensor | None = None,
    output_s: torch.Tensor | None = None,
    group_size: int = 128,
    scale_ue8m0: bool = False,
    fuse_silu_and_mul: bool = False,
    masked_m: torch.Tensor | None = None,
    expected_m: int | None = None,  # noqa: ARG001
    *,
    out_dtype: torch.dtype | None = None,
    column_major_scales: bool = False,  # noqa: ARG001
    sorted_token_ids: torch.Tensor | None = None,
    num_tokens_post_padded: torch.Tensor | None = None,  # noqa: ARG001
    num_valid_tokens: int = 0,  # noqa: ARG001
    silu_and_mul_mode: str = "legacy",  # noqa: ARG001
) -> OpCall | None:
    # With scale_ue8m0 scales are packed by four; without buffers SGLang lays them out.
    unusual = scale_ue8m0 or fuse_silu_and_mul or masked_m is not None or sorted_token_ids is not None
    if unusual or output_q is None or output_s is None or out_dtype not in (None, output_q.dtype):
        return None
    limits = (GROUP_EPS, -FP8_MAX, FP8_MAX)
    return OpCall((input, output_q, output_s, group_size, *limits, False, False, False), (output_q, output_s))


def _per_token_group_quant_8bit_v2(
    input: torch.Tensor,
    output_q: torch.Tensor,
    output_s: torch.Tensor,
    group_size: int,
    eps: float,
    min_8bit: float,
    max_8bit: float,
    scale_ue8m0: bool = False,
    fuse_silu_and_mul: bool = False,
    masked_m: torch.Tensor | None = None,
) -> OpCall | None:
    if fuse_silu_and_mul or masked_m is not None:
        return None
    limits = (eps, min_8bit, max_8bit)
    return OpCall((input, output_q, output_s, group_size, *limits, scale_ue8m0, False, False), None)


def _apply_rope_with_cos_sin_cache_inplace(
    q: torch.Tensor,
    k: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    positions: torch.Tensor,
    *,
    is_neox: bool,
    rope_dim: int = 0,
    fused_args: object | None = None,
) -> OpCall | None:
    head_size = q.size(-1)
    rotated = rope_dim or cos_sin_cache.size(-1)
    if fused_args is not None or not (head_size == k.size(-1) == rotated == cos_sin_cache.size(-1)):
        return None  # K and V are stored too, or only a part of the head is given
    return OpCall((positions, q, k, head_size, cos_sin_cache, is_neox, 0, False), None)


def _fp8_scaled_mm(
    mat_a: torch.Tensor,
    mat_b: torch.Tensor,
    scales_a: torch.Tensor,
    scales_b: torch.Tensor,
    out_dtype: torch.dtype,
    bias: torch.Tensor | None = None,
) -> OpCall | None:
    if mat_a.dim() != 2 or mat_b.dim() != 2:
        return None
    out = mat_a.new_empty((mat_a.size(0), mat_b.size(1)), dtype=out_dtype)
    return OpCall((out, mat_a, mat_b, scales_a, scales_b, bias), out)


def _w8a8_block_fp8_matmul_deepgemm(
    A: torch.Tensor,
    B: torch.Tensor,
    As: torch.Tensor,
    Bs: torch.Tensor,
    block_size: list[int],
    output_dtype: torch.dtype,
) -> OpCall | None:
    # Scales packed by four are int32.
    if list(block_size) != BLOCK or A.dim() != 2 or B.dim() != 2 or Bs.dim() != 2 or torch.int32 in (As.dtype, Bs.dtype):
        return None
    out = A.new_empty((A.size(0), B.size(0)), dtype=output_dtype)
    return OpCall((out, A, B.t(), As, Bs.t()), out)


def _w8a8_block_fp8_matmul_triton(
    A: torch.Tensor,
    B: torch.Tensor,
    As: torch.Tensor,
    Bs: torch.Tensor,
    block_size: list[int],
    output_dtype: torch.dtype = torch.float16,
) -> OpCall | None:
    return _w8a8_block_fp8_matmul_deepgemm(A, B, As, Bs, block_size, output_dtype)


_OPS = "sglang.kernels.ops"
_QUANT = f"{_OPS}.quantization"
_V2 = "per_token_group_quant_8bit_v2"

#: What the plug-in serves. Functions that others of SGLang's call are named, not their callers.
FUNCTIONS = (
    Function("sgl_kernel.rmsnorm", "rms_norm", _rmsnorm),
    Function("sgl_kernel.fused_add_rmsnorm", "fused_add_rms_norm", _fused_add_rmsnorm),
    Function(f"{_OPS}.activation.activation.silu_and_mul", "silu_and_mul", _silu_and_mul, "activation.silu_and_mul"),
    Function(
        f"{_QUANT}.sgl_per_token_quant_fp8",
        "dynamic_per_token_scaled_fp8_quant",
        _sgl_per_token_quant_fp8,
        "quantization.sgl_per_token_quant_fp8",
    ),
    Function(
        f"{_QUANT}.per_token_group_quant.per_token_group_quant",
        "per_token_group_fp8_quant",
        _per_token_group_quant,
        "quantization.per_token_group_quant",
    ),
    Function(f"{_QUANT}.{_V2}.{_V2}", "per_token_group_fp8_quant", _per_token_group_quant_8bit_v2),
    Function(
        f"{_OPS}.attention.rope.apply_rope_with_cos_sin_cache_inplace",
        "rotary_embedding",
        _apply_rope_with_cos_sin_cache_inplace,
    ),
    # Below SGLang's own choice of a backend, which takes torch's product for some large ones.
    Function(f"{_OPS}.gemm.Fp8ScaledMMOp.forward_aot", "scaled_mm", _fp8_scaled_mm, "gemm.fp8_scaled_mm"),
    Function(
        f"{_OPS}.gemm.fp8_kernel.w8a8_block_fp8_matmul_deepgemm",
        "scaled_mm_blockwise",
        _w8a8_block_fp8_matmul_deepgemm,
        "gemm.w8a8_block_fp8_matmul_deepgemm",
    ),
    Function(
        f"{_OPS}.gemm.fp8_kernel.w8a8_block_fp8_matmul_triton",
        "scaled_mm_blockwise",
        _w8a8_block_fp8_matmul_triton,
        "gemm.w8a8_block_fp8_matmul_triton",
    ),
)

#: By the last part of the operator's name in SGLang's kernel registry.
KERNELS = SimpleNamespace(**{each.kernel.rpartition(".")[2]: each.make_kernel() for each in FUNCTIONS if each.kernel})
