"""vLLM's low-latency GEMMs in CuteDSL as peers: functions with TVM FFI's ABI in a library that `vllm_ll_build` makes.

vLLM compiles its `ll_bf16_gemm` and `skinny_gemm` as they are called, which takes the DSL. Here they come compiled, a
function for each M, K, N and output that vLLM's own dispatch was asked for; a call of another size has none. Only GPU time
can be compared: the calls come from Python through ctypes.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from hdispatch.errors import HdispatchError
from hdispatch.opspec import dtype_name
from torch import Tensor

from .peers import Bound

OP = "ll_gemm_bf16"
#: The forms of each of vLLM's two functions, which its dispatch chooses from.
LL_BF16_FORMS = ("dotprod", "splitk")
SKINNY_FORMS = ("skinny",)
#: More rows vLLM's `skinny_gemm` refuses.
SKINNY_MOST_M = 16
#: More outputs are no router's, which both are for; the library has no functions of them.
MOST_N = 2**15

#: Marks where a call's arguments have the stream.
_STREAM = object()
#: By form: what its function takes, from out, x and w.
_ARGUMENTS: dict[str, Callable[[Tensor, Tensor, Tensor], list[object]]] = {
    "dotprod": lambda out, x, w: [x, w, out, w.size(0), _STREAM],
    "splitk": lambda out, x, w: [x, w, out, _STREAM, 1.0],
    "skinny": lambda out, x, w: [x, w, out, out, _STREAM],  # the residual is not read
}


def function_name(form: str, out: torch.dtype, m: int, k: int, n: int) -> str:
    """The function of a form for one size, without the ABI's prefix."""
    return f"vllm_{form}_{dtype_name(out)}_m{m}_k{k}_n{n}"


class Library:
    """An opened library; it stays open. HdispatchError if it is none of `vllm_ll_build`."""

    def __init__(self, path: Path) -> None:
        try:
            self._library = ctypes.CDLL(str(path.resolve()))
            self._error = self._library.hdispatch_ffi_error
        except (OSError, AttributeError) as error:
            raise HdispatchError(f"--vllm-ll {path}: {error}; bench ops --make-vllm-ll makes one") from error
        self._error.restype = ctypes.c_char_p
        self._path = path

    def bind_ll_bf16(self, op: str, arguments: Sequence[Any]) -> Bound | None:
        """vLLM's `ll_bf16_gemm`; None for more than MOST_N outputs."""
        return self._bind(LL_BF16_FORMS, *arguments) if op == OP and arguments[2].size(0) <= MOST_N else None

    def bind_skinny(self, op: str, arguments: Sequence[Any]) -> Bound | None:
        """vLLM's `skinny_gemm`; None where it does not serve: more than 16 rows, another type than that of x; and as above."""
        if op != OP or arguments[0].dtype != arguments[1].dtype or arguments[1].size(0) > SKINNY_MOST_M:
            return None
        return self._bind(SKINNY_FORMS, *arguments) if arguments[2].size(0) <= MOST_N else None

    def _bind(self, forms: Sequence[str], out: Tensor, x: Tensor, w: Tensor) -> Bound:
        (m, k), n = x.shape, w.size(0)
        for form in forms:
            name = function_name(form, out.dtype, m, k, n)
            if (function := getattr(self._library, f"__tvm_ffi_{name}", None)) is not None:
                return _Call(name, function, self._message, _ARGUMENTS[form](out, x, w)), ()
        raise HdispatchError(
            f"{self._path} has no {' or '.join(forms)} for M={m}, K={k}, N={n} and {dtype_name(out.dtype)}; "
            "it was made for other sizes: bench ops --make-vllm-ll makes it for those of the op's spec"
        )

    def _message(self) -> str:
        kind = ctypes.c_char_p()
        message = self._error(ctypes.byref(kind)) or b""
        return f"{(kind.value or b'').decode()}: {message.decode(errors='replace')}"


# ---- the ABI ----


class _TensorView(ctypes.Structure):
    """DLTensor."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Any(ctypes.Structure):
    """TVMFFIAny; `value` has the bits of whatever the type says."""

    _fields_ = (("type", ctypes.c_int32), ("padding", ctypes.c_uint32), ("value", ctypes.c_int64))


_NONE, _INT, _FLOAT, _POINTER, _TENSOR = 0, 1, 3, 4, 7
#: DLPack's codes of types and devices.
_DTYPES = {torch.float32: (2, 32), torch.bfloat16: (4, 16)}
_DEVICES = {"cpu": 1, "cuda": 2}


class _Call:
    """A function with arguments that are made once. Calling it launches on the current stream."""

    def __init__(self, name: str, function: Any, message: Callable[[], str], arguments: Sequence[object]) -> None:
        self._name, self._function, self._message = name, function, message
        self._kept: list[object] = list(arguments)  # the tensors, and what the views of them point to
        self._arguments = (_Any * len(arguments))(*(self._convert(value) for value in arguments))
        self._stream = self._arguments[next(at for at, value in enumerate(arguments) if value is _STREAM)]
        self._device = next(value.device for value in arguments if isinstance(value, Tensor))
        self._result = _Any(_NONE, 0, 0)

    def __call__(self) -> None:
        self._stream.value = _current_stream(self._device)
        if self._function(None, self._arguments, len(self._arguments), ctypes.byref(self._result)):
            raise HdispatchError(f"{self._name}: {self._message()}")

    def _convert(self, value: object) -> _Any:
        if isinstance(value, Tensor):
            return _Any(_TENSOR, 0, ctypes.addressof(self._view(value)))
        if isinstance(value, float):
            return _Any(_FLOAT, 0, struct.unpack("q", struct.pack("d", value))[0])
        return _Any(_INT, 0, value) if isinstance(value, int) else _Any(_POINTER, 0, 0)

    def _view(self, tensor: Tensor) -> _TensorView:
        sizes, strides = ((ctypes.c_int64 * tensor.dim())(*each) for each in (tensor.shape, tensor.stride()))
        device = _DEVICES[tensor.device.type], tensor.device.index or 0
        view = _TensorView(tensor.data_ptr(), *device, tensor.dim(), *_DTYPES[tensor.dtype], 1, sizes, strides, 0)
        self._kept += [sizes, strides, view]
        return view


def _current_stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
