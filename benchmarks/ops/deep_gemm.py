"""DeepGEMM as a peer of scaled_mm_blockwise: vLLM's default for blocks on Hopper, called as vLLM calls it, and checked.

It compiles its kernels with nvcc as they are called: for the timing they are compiled ahead, by many processes, into its
cache on disk.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from hdispatch import registry
from hdispatch.errors import HdispatchError, first_line
from hdispatch.opspec import OpSpec, Variant
from hdispatch.testing.numeric import compare_outputs, poison
from torch import Tensor

from . import compiled
from .grid import Cell
from .peers import Bound
from .timing import make_arguments, require_gpu

OP = "scaled_mm_blockwise"
#: Where DeepGEMM keeps what it has compiled.
CACHE_VARIABLE = "DG_JIT_CACHE_DIR"
#: Rows that a column of scales is padded to: the TMA takes strides of 16 bytes, and a scale has four.
ALIGNED_ROWS = 4


class DeepGemm:
    """The imported package. HdispatchError, with the reason, where it cannot be imported."""

    def __init__(self, package: Path) -> None:
        if CACHE_VARIABLE not in os.environ:
            self._cache = tempfile.TemporaryDirectory(prefix="hdispatch-deep-gemm-", ignore_cleanup_errors=True)
            os.environ[CACHE_VARIABLE] = self._cache.name  # for the processes that compile, too
        self.package = package
        module = _import(package)
        self.version: str = module.__version__
        module.set_pdl(True)  # as vLLM does on Hopper
        self._multiply: Callable[..., None] = module.fp8_gemm_nt

    def bind(self, op: str, arguments: Sequence[Any]) -> Bound | None:
        """The call with float32 scales, once it has computed what the reference does; None for what it has no kernel for."""
        return self._checked(arguments) if serves(op, arguments) else None

    def bind_ue8m0(self, op: str, arguments: Sequence[Any]) -> Bound | None:
        """The same with scales that are powers of two, which vLLM makes unless told otherwise; on Hopper they stay float32."""
        if not serves(op, arguments):
            return None
        out, a, b, a_scales, b_scales = arguments
        return self._checked([out, a, b, powers_of_two(a_scales), powers_of_two(b_scales)], ue8m0=True)

    def call(self, arguments: Sequence[Any], ue8m0: bool = False) -> Bound:
        """What vLLM calls, with the scales where its quantization and its loading of weights put them."""
        out, a, b, a_scales, b_scales = arguments
        quantized, weights = (a, aligned_columns(a_scales)), (b.t(), b_scales.t().contiguous())
        return functools.partial(self._multiply, disable_ue8m0_cast=not ue8m0), (quantized, weights, out)

    def _checked(self, arguments: Sequence[Any], ue8m0: bool = False) -> Bound:
        """MismatchError if a call writes something else than the float32 reference."""
        spec, (out, *inputs) = registry.spec(OP), arguments
        call, given = self.call(arguments, ue8m0)
        poison(out)
        call(*given)
        wanted = torch.empty_like(out)
        spec.reference(wanted, *inputs)
        compare_outputs(spec, _variant(spec, out), [out, *inputs], [wanted, *inputs])
        return call, given


def serves(op: str, arguments: Sequence[Any]) -> bool:
    """Whether vLLM gives DeepGEMM such a call: bfloat16, K a multiple of 128 and N of 64."""
    if op != OP:
        return False
    out, b = arguments[0], arguments[2]
    return bool(out.dtype == torch.bfloat16 and b.size(0) % 128 == 0 and b.size(1) % 64 == 0)


def aligned_columns(scales: Tensor) -> Tensor:
    """Scales [M, K / 128] by columns, each padded to `ALIGNED_ROWS`."""
    rows, columns = scales.shape
    stride = -(-rows // ALIGNED_ROWS) * ALIGNED_ROWS
    return torch.empty_strided((rows, columns), (1, stride), dtype=scales.dtype, device=scales.device).copy_(scales)


def powers_of_two(scales: Tensor) -> Tensor:
    """Positive float32 scales rounded up to powers of two, strides kept."""
    bits = scales.view(torch.int32)
    return ((bits + 0x7FFFFF) & 0x7F800000).view(torch.float32)


def _variant(spec: OpSpec, out: Tensor) -> Variant:
    return next(each for each in spec.variants() if each.dtypes["out"] == out.dtype)


def _import(package: Path) -> Any:
    """The package in the folder `package`, as `deep_gemm`: vLLM, which it may lie in, is not imported."""
    file = package.resolve() / "__init__.py"
    spec = importlib.util.spec_from_file_location("deep_gemm", file, submodule_search_locations=[str(file.parent)])
    if spec is None or spec.loader is None or not file.is_file():
        raise HdispatchError(f"--deep-gemm {package} has no __init__.py; it is vllm/third_party/deep_gemm of vLLM's wheel")
    module = importlib.util.module_from_spec(spec)
    sys.modules["deep_gemm"] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # it loads a library, looks for nvcc, asserts: whatever fails is the reason
        del sys.modules["deep_gemm"]
        raise HdispatchError(f"--deep-gemm {package}: {type(error).__name__}: {first_line(error)}") from error
    return module


# ---- ahead of the timing ----


def compile_ahead(
    package: Path, cells: Sequence[Cell], processes: int, deadline: float, tick: Callable[[], None] = lambda: None
) -> compiled.Compiled:
    """Have `processes` processes call DeepGEMM in every cell of its op, until `deadline` of time.monotonic.

    Cells share kernels; of those that come late most are there already.
    """
    wanted = [cell for cell in cells if cell["op"] == OP]
    if not wanted:
        return compiled.Compiled()
    call = functools.partial(compile_cell, package)
    return compiled.compile_cells(wanted, min(processes, len(wanted)), deadline, None, tick, call)


def compile_cell(package: Path, cell: Cell) -> float:
    """Seconds of a first call."""
    start, device = time.perf_counter(), require_gpu()
    arguments = make_arguments(cell, device)
    if serves(cell["op"], arguments):
        call, given = _opened(package).call(arguments)
        call(*given)
        torch.cuda.synchronize(device)
    del arguments
    torch.cuda.empty_cache()
    return time.perf_counter() - start


@functools.cache
def _opened(package: Path) -> DeepGemm:
    return DeepGemm(package)
