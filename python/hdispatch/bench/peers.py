"""Who takes part in the op benchmark: hdispatch, vLLM's library behind torch.ops._C (CUTLASS in it), torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..errors import HdispatchError
from ..opspec import OpSpec, TensorArg

Call = Callable[..., object]
#: Makes the call of an op from the op's own arguments: what to call, and the arguments it takes.
Bound = tuple[Call, tuple[Any, ...]]

OURS = "hdispatch"
OURS_TORCH = "torch.ops.hdispatch"
VLLM = "torch.ops._C"
COMPILE = "torch.compile"

#: vLLM's name of an op where it is another.
VLLM_NAMES = {"scaled_mm": "cutlass_scaled_mm", "scaled_mm_blockwise": "cutlass_scaled_mm"}


def load_vllm_ops(library: Path) -> None:
    """Load vLLM's compiled ops; HdispatchError if torch cannot."""
    try:
        torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]
    except OSError as error:
        raise HdispatchError(f"--vllm-ops {library}: {str(error).splitlines()[0]}") from error


def vllm_op(op: str) -> Any:
    """vLLM's counterpart of an op, or None where the loaded library has none."""
    return getattr(torch.ops._C, VLLM_NAMES.get(op, op), None)


def bind_vllm(op: str, arguments: Sequence[Any]) -> Bound | None:
    """vLLM's call with our arguments: in order, less what only we take, None for what only it takes."""
    packet = vllm_op(op)
    if packet is None:
        return None
    count = len(packet.default._schema.arguments)
    return packet, tuple([*arguments, *[None] * count][:count])


def bind_ours(op: str, arguments: Sequence[Any]) -> Bound:
    """`hdispatch.ops.<op>`."""
    return ops.get(op), tuple(arguments)


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
