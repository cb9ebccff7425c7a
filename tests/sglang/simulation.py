"""What SGLang finds without a GPU: an H100 that is none, packages that do nothing, kernels of its own that note their names."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Callable
from typing import Any

import torch

#: What its modules import at the top and these tests do not run.
ABSENT = (
    *("IPython", "PIL", "aiohttp", "compressed_tensors", "deep_gemm", "fastapi", "flashinfer", "gguf", "httpx"),
    *("huggingface_hub", "psutil", "pydantic", "pydantic_core", "regex", "requests", "safetensors", "sentencepiece"),
    *("sgl_kernel", "starlette", "torchvision", "tqdm", "transformers", "triton_kernels", "urllib3", "zmq"),
)
#: Names of SGLang's own kernels, as they ran.
RAN: list[str] = []


class Nothing(type):
    """A class of which all that is asked for is another such class."""

    def __new__(cls, name: str, bases: tuple[type, ...] = (), body: Any = None, **_: object) -> Any:
        return type.__new__(cls, name, bases, dict(body or {}))

    def __init__(cls, *_: object, **__: object) -> None: ...

    def __getattr__(cls, name: str) -> Any:
        if name == "__class_validators__":
            return []
        if name.startswith("__"):
            raise AttributeError(name)
        return nothing(name)

    def __call__(cls, *given: Any, **named: Any) -> Any:  # a decorator too
        return given[0] if len(given) == 1 and callable(given[0]) and not named else type.__call__(cls)

    def __or__(cls, other: object) -> Any:
        return cls

    __ror__ = __or__

    def __getitem__(cls, key: object) -> Any:
        return cls

    def __setitem__(cls, key: object, value: object) -> None: ...

    def __iter__(cls) -> Any:
        return iter(())

    def __len__(cls) -> int:
        return 0


def nothing(name: str) -> Any:
    return Nothing(
        name, (), {"__init__": lambda *_, **__: None, "__call__": lambda _, *given, **__: given[0] if given else None}
    )


class Empty(types.ModuleType):
    """A module that has whatever is asked for."""

    __path__ = ()
    __version__ = "1.0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = nothing(name)
        setattr(self, name, made)
        return made


def absent() -> set[str]:
    """Those of `ABSENT` that are not installed."""
    return {name for name in ABSENT if getattr(importlib.util.find_spec(name), "loader", None) is None}


class Finder:
    """Gives an empty module for each of `ABSENT` that is not installed, and all below it."""

    def __init__(self) -> None:
        self._names = absent()

    def find_spec(self, name: str, *_: object) -> Any:
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.partition(".")[0] in self._names else None

    def create_module(self, spec: Any) -> Any:
        return Empty(spec.name)

    def exec_module(self, module: Any) -> None: ...


def simulate() -> None:
    """From now on this process may import SGLang, which takes it for one on an H100."""
    sys.meta_path.append(Finder())
    properties = types.SimpleNamespace(
        major=9, minor=0, name="NVIDIA H100", multi_processor_count=132, total_memory=80 << 30, gcnArchName=""
    )
    torch.version.cuda = "13.0"
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 1
    torch.cuda.current_device = lambda: 0
    torch.cuda.get_rng_state = lambda *_: torch.zeros(1)
    torch.cuda.set_rng_state = lambda *_: None
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    torch.cuda.get_device_properties = lambda *_: properties
    sys.modules["sgl_kernel"] = sgl_kernel()


def noting(name: str, result: Any = None) -> Callable[..., Any]:
    """A kernel that notes its name; it returns `result`, called with the arguments if that can be called."""

    def kernel(*args: Any, **named: Any) -> Any:
        RAN.append(name)
        return result(*args, **named) if callable(result) else result

    return kernel


def sgl_kernel() -> types.ModuleType:
    """sglang-kernel 0.4.10, as far as functions are hooked: with its parameters."""
    made = Empty("sgl_kernel")

    def rmsnorm(input: Any, weight: Any, eps: float = 1e-6, out: Any = None, enable_pdl: Any = None) -> Any:
        RAN.append("rmsnorm")
        return torch.zeros_like(input) if out is None else out

    def fused_add_rmsnorm(input: Any, residual: Any, weight: Any, eps: float = 1e-6, enable_pdl: Any = None) -> None:
        RAN.append("fused_add_rmsnorm")

    made.rmsnorm, made.fused_add_rmsnorm = rmsnorm, fused_add_rmsnorm
    made.silu_and_mul = noting("silu_and_mul")
    made.fp8_scaled_mm = noting("fp8_scaled_mm", lambda a, b, *_: torch.zeros(a.size(0), b.size(1), dtype=torch.bfloat16))
    return made


def note_kernels() -> None:
    """Put kernels that note their names below SGLang's functions: in the place of what it compiles when they first run."""
    ops = "sglang.kernels.ops"
    at = {
        f"{ops}.activation.activation": ("run_activation",),
        f"{ops}.quantization.per_token_quant_fp8": ("per_token_quant_fp8",),
        f"{ops}.quantization.per_token_group_quant": ("_per_token_group_quant_custom_op",),
        f"{ops}.quantization.per_token_group_quant_8bit_v2": ("_per_token_group_quant_8bit_v2_custom_op",),
        f"{ops}.attention.rope": ("apply_rope_inplace", "apply_rope_inplace_with_kvcache"),
        f"{ops}.gemm.fp8_kernel": ("deep_gemm_fp8_fp8_bf16_nt",),
    }
    for module, names in at.items():
        imported = importlib.import_module(module)
        for name in names:
            assert callable(getattr(imported, name)), f"{module} has no {name}"
            setattr(
                imported, name, noting(name.strip("_").removesuffix("_custom_op"), _out if name == "run_activation" else None)
            )

    triton = sys.modules[f"{ops}.gemm.fp8_kernel"]
    triton.get_w8a8_block_fp8_configs = lambda *_: None
    triton.select_w8a8_block_fp8_matmul_kernel = lambda *_: TritonKernel()


class TritonKernel:
    """Launched as kernel[grid](…)."""

    def __getitem__(self, grid: object) -> Callable[..., Any]:
        return noting("w8a8_block_fp8_matmul")


def _out(kind: str, input: Any, out: Any, *_: Any, **__: Any) -> Any:
    return input.new_empty(*input.shape[:-1], input.shape[-1] // 2) if out is None else out
