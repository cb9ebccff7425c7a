"""vLLM's warm-up registry without a GPU: what vLLM would compile as it starts, compiled for a described GPU, to be recorded.

    python -m hdispatch.cli.vllm_warmup TARGET SCRIPT [ARGUMENTS]      which `hdispatch record --vllm-warmup` runs

SCRIPT is run with a registry of vLLM's active. It registers kernels as vLLM's layers and runners do: by making them, or by
`KERNEL.register_warmup(...)`. Then each kernel's own warm-up is run, which compiles and launches nothing. The script may set
`vllm_config`, which goes to kernels that are registered without arguments. A kernel whose warm-up fails (one that is autotuned
needs a GPU to time on) is named, and the others are compiled; the exit code is then 1.
"""

from __future__ import annotations

import importlib
import os
import runpy
import sys
import traceback
from typing import TYPE_CHECKING, Any

from ..errors import HdispatchError

if TYPE_CHECKING:
    from ..compile.target import GpuTarget


def main(argv: list[str]) -> int:
    """Run the script, then the warm-up of what it registered."""
    from ..compile.target import DESCRIBED, install

    name, script, *arguments = argv
    target = DESCRIBED[name]
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # vLLM then takes Triton without asking how many drivers are active
    install(target)
    jit_warmup = _import_vllm(target)
    registry = jit_warmup.JitWarmupRegistry(None)
    sys.argv = [script, *arguments]
    with registry.activate():
        registry.vllm_config = runpy.run_path(script, run_name="__main__").get("vllm_config")
    if not len(registry):
        raise HdispatchError(f"{script}: registered no kernel; call register_warmup(...) of some, as their layers do")
    failed = [kernel for kernel in registry._registrations if not _warm_up(jit_warmup, registry, kernel)]
    print(f"vLLM's warm-up for {target.device_name}: {len(registry._registrations) - len(failed)} kernels compiled", flush=True)
    return 1 if failed else 0


def _import_vllm(target: GpuTarget) -> Any:
    """vLLM's module of the registry, with a platform that is the target."""
    try:
        platforms: Any = importlib.import_module("vllm.platforms")
        cuda: Any = importlib.import_module("vllm.platforms.cuda")
        interface: Any = importlib.import_module("vllm.platforms.interface")
        capability = interface.DeviceCapability(target.major, target.minor)
        answers = {
            "get_device_capability": capability,
            "get_device_name": target.device_name,
            "get_device_total_memory": target.memory,
            "num_compute_units": target.sm_count,
            "device_count": 1,
            "set_device": None,
        }
        members = {key: classmethod(lambda _cls, *_a, value=value, **_k: value) for key, value in answers.items()}
        platforms._current_platform = type("DescribedCudaPlatform", (cuda.NonNvmlCudaPlatform,), members)()
        return importlib.import_module("vllm.model_executor.warmup.jit_warmup")
    except ImportError as error:
        raise HdispatchError(f"--vllm-warmup needs vLLM 0.33 or later, which has a registry of warm-ups: {error}") from error


def _warm_up(jit_warmup: Any, registry: Any, kernel: Any) -> bool:
    """One kernel's warm-up by vLLM's own registry; false where it fails, which is told."""
    alone = jit_warmup.JitWarmupRegistry(registry.vllm_config)
    alone._registrations = {kernel: registry._registrations[kernel]}
    try:
        alone.warmup()
    except Exception as error:  # the others are to be compiled
        names = (getattr(kernel, "__qualname__", None), getattr(kernel, "__name__", None), type(kernel).__qualname__)
        told = "".join(traceback.format_exception_only(error)).strip()
        print(f"not compiled: {next(filter(None, names))}: {told}", file=sys.stderr, flush=True)
        return False
    return True


if __name__ == "__main__":
    try:
        code = main(sys.argv[1:])
    except HdispatchError as refused:
        print(f"hdispatch: error: {refused}", file=sys.stderr)
        code = 1
    sys.exit(code)
