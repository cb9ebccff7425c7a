"""Makes the library of `vllm_ll`: vLLM's own sources, its own dispatch, compiled ahead of time. Needs the CuteDSL, no GPU.

vLLM itself is not imported: its modules of the low-latency GEMMs are, with stand-ins for the three things that they import
from elsewhere (the platform, the current stream, a helper of quack that describes a tensor), as on an H200.
"""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hdispatch import registry
from hdispatch.errors import BuildError, HdispatchError

from .grid import STREAMED, op_shapes
from .vllm_ll import OP, SKINNY_MOST_M, function_name

SOURCES = Path("model_executor", "kernels", "linear", "cute_dsl")
ARCH, CAPABILITY = "sm_90a", 90
#: vLLM's split-K kernel never returns where a block of its cluster has no part of K; its dispatch keeps away from these.
SPLIT_K_FROM = 2048
#: The package that vLLM's modules are imported as.
_PACKAGE = "_hdispatch_vllm_cute_dsl"
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class _Size:
    """The dtype and sizes that one function is compiled for."""

    out: torch.dtype
    m: int
    k: int
    n: int

    def __str__(self) -> str:
        return f"M={self.m}, K={self.k}, N={self.n}, {self.out}"


def make(vllm: Path, out: Path, progress: Progress = lambda _done, _all, _label: None) -> int:
    """Write the library `out` from the vLLM in the folder `vllm`, or in vllm/vllm; returns how many functions it has.

    For the op's shapes, every M of its ladder and both types of its output. HdispatchError without vLLM's sources or the
    DSL, or if they do not compile. The code is for an H200, its host part for the CPU of this machine.
    """
    from hdispatch.compile import ffi_link

    folder = sources(vllm)
    if "cutlass" in sys.modules and os.environ.get("CUTE_DSL_ARCH") != ARCH:
        raise HdispatchError(f"cutlass was imported with another CUTE_DSL_ARCH than {ARCH}: do this in a process of its own")
    os.environ["CUTE_DSL_ARCH"] = ARCH
    if ffi_link.runtime_archive() is None:
        raise HdispatchError("compiling vLLM's kernels needs the CuteDSL: pip install 'hdispatch[cutedsl]'")
    wanted = sizes()
    objects: dict[str, bytes] = {}
    with tempfile.TemporaryDirectory() as scratch, _imported(folder) as (ll_bf16, skinny):
        for done, size in enumerate(wanted):
            progress(done, len(wanted), str(size))
            try:
                for form, compiled in _compile(ll_bf16, skinny, size):
                    name = function_name(form, size.out, size.m, size.k, size.n)
                    file = Path(scratch) / "function.o"
                    compiled.export_to_c(str(file), function_name=name)
                    objects[name] = file.read_bytes()
            except HdispatchError:
                raise
            except Exception as error:  # the DSL raises anything
                raise BuildError(f"{folder}: {size}: {type(error).__name__}: {error}") from error
        progress(len(wanted), len(wanted), "linking")
    out.write_bytes(ffi_link.link(objects))
    return len(objects)


def sources(vllm: Path) -> Path:
    """The folder of vLLM's CuteDSL kernels."""
    for folder in (vllm / SOURCES, vllm / "vllm" / SOURCES):
        if (folder / "ll_bf16.py").is_file():
            return folder.resolve()
    raise HdispatchError(f"{vllm} has no {SOURCES}/ll_bf16.py, nor has {vllm / 'vllm'}: name the folder of a vLLM 0.33")


def sizes() -> list[_Size]:
    """The op's shapes, the Ms of its ladder, the types of its output."""
    spec = registry.spec(OP)
    shapes = [shape for shape in op_shapes(spec, spec.typical_variant()) if shape.label not in STREAMED]
    types_of_out = dict.fromkeys(variant.dtypes["out"] for variant in spec.served_variants())
    return [_Size(dtype, m, shape.k, shape.n) for dtype in types_of_out for shape in shapes for m in spec.ladder]


# ---- vLLM's modules ----


def _compile(ll_bf16: Any, skinny: Any, size: _Size) -> Iterator[tuple[str, Any]]:
    """The form that vLLM's functions would choose for these sizes, and its compiled function."""
    gemm = ll_bf16.ll_bf16_gemm_c1_pdl_kernel if size.m == 1 else ll_bf16.ll_bf16_gemm_kernel
    key = gemm.dispatch(M=size.m, K=size.k, N=size.n, output_dtype=size.out)
    gemm.compile(key)
    if key.backend == "dotprod":
        yield key.backend, gemm._compiled_cache[key.M, key.K, key.bs, key.output_dtype]
    elif size.k >= SPLIT_K_FROM:
        yield key.backend, gemm._splitk_cache[key.split_k, key.num_stages, key.output_dtype]
    else:
        raise HdispatchError(f"vLLM's dispatch gives {size} to its split-K kernel, which hangs below K={SPLIT_K_FROM}")
    if size.m <= SKINNY_MOST_M and size.out == torch.bfloat16:
        gemm = skinny.shape_dynamic_skinny_gemm
        config = gemm._config(size.m, size.n, size.k)
        if size.k % (config.block_size * config.vector_width) == 0 and size.n % config.outputs_per_block == 0:
            if (size.out, config, False) not in gemm._compiled:
                gemm._compile(size.out, config, False)
            yield "skinny", gemm._compiled[size.out, config, False]


@contextmanager
def _imported(folder: Path) -> Iterator[tuple[Any, Any]]:
    """vLLM's `ll_bf16` and `skinny_gemm`, with stand-ins for what they import of vLLM and quack."""
    platform = types.SimpleNamespace(
        is_device_capability_family=lambda family: family // 10 == CAPABILITY // 10,
        is_device_capability=lambda capability: capability == CAPABILITY,
        is_arch_support_pdl=lambda: True,
    )
    stream = types.SimpleNamespace(cuda_stream=0)
    package = types.ModuleType(_PACKAGE)
    package.__path__ = [str(folder)]
    stand_ins = {
        _PACKAGE: package,
        "vllm.platforms": _module("vllm.platforms", current_platform=platform),
        "vllm.utils.torch_utils": _module("vllm.utils.torch_utils", current_stream=lambda: stream),
        "quack.compile_utils": _module("quack.compile_utils", make_fake_tensor=_fake_tensor),
    }
    before = {name: sys.modules.get(name) for name in stand_ins}
    sys.modules.update(stand_ins)
    try:
        yield tuple(importlib.import_module(f"{_PACKAGE}.{name}") for name in ("ll_bf16", "skinny_gemm"))  # type: ignore[misc]
    finally:
        for name in [name for name in sys.modules if name.startswith(f"{_PACKAGE}.")]:
            del sys.modules[name]
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def _module(name: str, **attributes: object) -> types.ModuleType:
    made = types.ModuleType(name)
    made.__dict__.update(attributes)
    return made


def _fake_tensor(dtype: Any, shape: Sequence[Any], divisibility: int = 1) -> Any:
    """A row-major tensor of any strides that are multiples of `divisibility`, aligned to as many elements."""
    from cutlass import cute  # type: ignore[import-not-found,import-untyped,unused-ignore]

    strides = [cute.sym_int64(divisibility=divisibility) for _ in shape[:-1]]
    align = max(divisibility * dtype.width // 8, 1)
    return cute.runtime.make_fake_tensor(dtype, tuple(shape), stride=(*strides, 1), assumed_align=align)
