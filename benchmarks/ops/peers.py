"""Who takes part in the op benchmark: hdispatch, torch.compile, cuBLAS, DeepGEMM, vLLM's _C (and CUTLASS), _moe_C, CuteDSL."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from hdispatch import registry
from hdispatch.errors import HdispatchError
from hdispatch.opspec import OpSpec, TensorArg
from torch import Tensor

Call = Callable[..., object]
#: Makes the call of an op from the op's own arguments: what to call, and the arguments it takes.
Bound = tuple[Call, tuple[Any, ...]]

OURS = "hdispatch"
OURS_TORCH = "torch.ops.hdispatch"
VLLM = "torch.ops._C"
COMPILE = "torch.compile"
#: cuBLAS.
TORCH_MM = "torch.mm"
#: cuBLAS, then torch's kernel over the logits that it wrote.
TORCH_MM_ARGMAX = "torch.mm + argmax"
#: cuBLAS, or CUTLASS, as torch chooses, of fp8 matrices with a scale per row and column.
TORCH_SCALED_MM = "torch._scaled_mm"
#: vLLM's two functions in CuteDSL: see `vllm_ll`.
LL_BF16, SKINNY = "vLLM ll_bf16_gemm", "vLLM skinny_gemm"
#: With scales of float32, and of powers of two: see `deep_gemm`.
DEEP_GEMM, DEEP_GEMM_UE8M0 = "DeepGEMM", "DeepGEMM UE8M0"
#: All that hdispatch is compared with, in the order of the report.
PEERS = (COMPILE, VLLM, DEEP_GEMM, DEEP_GEMM_UE8M0, TORCH_MM, TORCH_MM_ARGMAX, TORCH_SCALED_MM, LL_BF16, SKINNY)

#: vLLM's name of an op where it is another.
VLLM_NAMES = {
    "scaled_mm": "cutlass_scaled_mm",
    "scaled_mm_blockwise": "cutlass_scaled_mm",
    "ll_gemm_fp8": "cutlass_scaled_mm",
}


def load_vllm_ops(library: Path) -> None:
    """Load vLLM's compiled ops, and those of a mixture of experts where their library lies beside, as in vLLM's folder.

    HdispatchError if torch cannot.
    """
    for path in (library, *sorted(library.parent.glob("_moe_C*.so"))):
        try:
            torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]
        except OSError as error:
            raise HdispatchError(f"--vllm-ops {path}: {str(error).splitlines()[0]}") from error


def vllm_op(op: str) -> Any:
    """vLLM's counterpart of an op, or None where the loaded libraries have none."""
    name = VLLM_NAMES.get(op, op)
    return getattr(torch.ops._C, name, None) or getattr(torch.ops._moe_C, name, None)


def bind_vllm(op: str, arguments: Sequence[Any]) -> Bound | None:
    """vLLM's call with our arguments: in order, less what only we take, None for what only it takes."""
    packet = vllm_op(op)
    if packet is None:
        return None
    count = len(packet.default._schema.arguments)
    given = _by_columns(*arguments) if op == "ll_gemm_fp8" else arguments
    return packet, tuple([*given, *[None] * count][:count])


def _by_columns(out: Tensor, x: Tensor, w: Tensor, x_scale: Tensor, w_scale: Tensor) -> list[Tensor]:
    """As CUTLASS takes them: the weights [K, N] by columns, the scales a column and a row."""
    return [out, x, w.t(), x_scale.reshape(-1, 1), w_scale.reshape(1, -1)]


def bind_torch_mm(op: str, arguments: Sequence[Any]) -> Bound | None:
    """`torch.mm(x, w.t(), out=out)`; its matrices are bfloat16, so it is the peer of one op."""
    if op != "ll_gemm_bf16":
        return None
    out, x, w = arguments
    wider = {} if out.dtype == x.dtype else {"out_dtype": out.dtype}
    return functools.partial(torch.mm, out=out, **wider), (x, w.t())


def bind_torch_mm_argmax(op: str, arguments: Sequence[Any]) -> Bound | None:
    """`torch.mm` to logits that are there, and `torch.argmax` of them: two launches."""
    if op != "ll_gemm_bf16_argmax":
        return None
    out, x, w = arguments
    logits = torch.empty(x.size(0), w.size(0), dtype=x.dtype, device=x.device)
    return _mm_argmax, (out, logits, x, w.t())


def _mm_argmax(out: Tensor, logits: Tensor, x: Tensor, w: Tensor) -> None:
    torch.mm(x, w, out=logits)
    torch.argmax(logits, dim=-1, out=out)


def bind_torch_scaled_mm(op: str, arguments: Sequence[Any]) -> Bound | None:
    """`torch._scaled_mm` with a scale per row [M, 1] and per column [1, N]; torch multiplies so to bfloat16 only.

    Sums are added as fast as they are in our kernels. K and N are multiples of 16 there.
    """
    if op != "scaled_mm":
        return None
    out, a, b, a_scales, b_scales, bias = arguments
    if out.dtype != torch.bfloat16 or a.size(1) % 16 or b.size(1) % 16:
        return None
    scales = a_scales.reshape(-1, 1).expand(a.size(0), 1), b_scales.reshape(1, -1).expand(1, b.size(1))
    given = (a, b, *(each.contiguous() for each in scales))
    return functools.partial(torch._scaled_mm, bias=bias, out_dtype=out.dtype, use_fast_accum=True, out=out), given


def bind_ours(op: str, arguments: Sequence[Any]) -> Bound:
    """`hdispatch.ops.<op>`."""
    return registry.get(op), tuple(arguments)


def bind_ours_torch(op: str, arguments: Sequence[Any]) -> Bound:
    """`torch.ops.hdispatch.<op>`."""
    return getattr(torch.ops.hdispatch, op), tuple(arguments)


#: Arguments that vLLM lays out by columns: the scales of a block-wise GEMM.
BY_COLUMNS = {("scaled_mm_blockwise", "a_scales"), ("scaled_mm_blockwise", "b_scales")}


def arrange(spec: OpSpec, arguments: Sequence[Any]) -> list[Any]:
    """The arguments in the layouts and ranks that vLLM's forward uses."""
    return [_arranged(spec, arg, value) for arg, value in zip(spec.args, arguments, strict=True)]


def _arranged(spec: OpSpec, arg: object, value: Any) -> Any:
    if not isinstance(arg, TensorArg) or not isinstance(value, Tensor):
        return value
    if (spec.name, arg.name) in BY_COLUMNS and arg.layout in ("columns", "any"):
        return torch.empty_strided(value.shape, (1, value.shape[0]), dtype=value.dtype, device=value.device).copy_(value)
    if arg.pad and value.dim() == 3 and value.shape[1] == 1:  # a row is [K] there
        return value.squeeze(1)
    return value


def copied(arguments: Sequence[Any]) -> list[Any]:
    """The same arguments in other memory, strides kept."""
    return [_copy(value) if isinstance(value, Tensor) else value for value in arguments]


def _copy(value: Tensor) -> Tensor:
    if 0 in value.stride():  # elements that share memory
        return value.clone()
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device).copy_(value)
