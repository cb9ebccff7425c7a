"""The description of a GPU, from a table or read from the GPU that is here; and a process that simulates it.

Code generation asks torch and Triton for the device: capability, SM count, shared memory. `install` answers for them, so
that a worker generates and compiles for any target on any machine, and the same on a machine that has a GPU.
"""

from __future__ import annotations

import ctypes
import re
import sys
import types
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import BuildError
from ..manifest import Target

GUARD_LIBRARY = "_noop_cuda_guard.so"


@dataclass(frozen=True)
class GpuTarget:
    """A GPU as far as compiling for it goes. Memory sizes are in bytes.

    name            what files and manifests call it, e.g. "h200"; its configs are in nvidia_<name>.json
    device_name     what CUDA calls it
    shared_memory   per block, opted in
    """

    name: str
    device_name: str
    major: int
    minor: int
    sm_count: int
    shared_memory: int
    memory: int
    l2: int

    @property
    def capability(self) -> int:
        """The compute capability as one number: 90 for 9.0."""
        return self.major * 10 + self.minor

    @property
    def arch(self) -> str:
        """The architecture that Triton compiles for: specific (`a`) from Hopper on, so the code runs on no other."""
        return f"sm_{self.capability}" + ("a" if self.major >= 9 else "")

    @property
    def config_file(self) -> str:
        """Name of the config files for this GPU."""
        return f"nvidia_{self.name}.json"

    def manifest(self) -> Target:
        """As a bundle's manifest has it."""
        return {
            "name": self.name,
            "arch": self.arch,
            "compute_capability": [self.major, self.minor],
            "sm_count": self.sm_count,
            "shared_memory": self.shared_memory,
        }

    def code_key(self) -> dict[str, Any]:
        """What compiled code depends on: not on names and the size of memory, so an H100 and an H200 share it."""
        return {name: value for name, value in self.to_json().items() if name not in ("name", "device_name", "memory")}

    def to_json(self) -> dict[str, Any]:
        """As plain data; `GpuTarget(**data)` reads it back."""
        return asdict(self)


DESCRIBED: dict[str, GpuTarget] = {
    target.name: target
    for target in (
        GpuTarget("a100", "NVIDIA A100-SXM4-80GB", 8, 0, 108, 166912, 80 << 30, 40 << 20),
        GpuTarget("h100", "NVIDIA H100 80GB HBM3", 9, 0, 132, 232448, 80 << 30, 50 << 20),
        GpuTarget("h200", "NVIDIA H200", 9, 0, 132, 232448, 141 << 30, 50 << 20),
        GpuTarget("b200", "NVIDIA B200", 10, 0, 148, 232448, 180 << 30, 126 << 20),
    )
}


def resolve(target: str | GpuTarget) -> GpuTarget:
    """The target of that name; "native" is the GPU that is here. BuildError for an unknown name or no GPU."""
    if isinstance(target, GpuTarget):
        return target
    if target == "native":
        return present()
    if target not in DESCRIBED:
        raise BuildError(
            f"no target {target!r}; described targets are {sorted(DESCRIBED)}, and 'native' is the GPU that is here"
        )
    return DESCRIBED[target]


def of_manifest(target: Target) -> GpuTarget:
    """The GPU that a bundle is for: described, or the one that is here. BuildError if it is neither."""
    known = [DESCRIBED[target["name"]]] if target["name"] in DESCRIBED else []
    known += [present()] if torch.cuda.is_available() else []
    for each in known:
        if each.manifest() == target:
            return each
    raise BuildError(
        f"the bundle is for {target['name']} ({target['arch']}, {target['sm_count']} SMs), which is not described and not "
        "here; build on a machine that has one"
    )


def present() -> GpuTarget:
    """The first CUDA device of this process. BuildError if there is none."""
    if not torch.cuda.is_available():
        raise BuildError(
            "target 'native': torch sees no CUDA device "
            f"(torch {torch.__version__}, CUDA {torch.version.cuda}); name one of {sorted(DESCRIBED)} to build without a GPU"
        )
    properties = torch.cuda.get_device_properties(0)
    return GpuTarget(
        name=short_name(properties.name),
        device_name=properties.name,
        major=properties.major,
        minor=properties.minor,
        sm_count=properties.multi_processor_count,
        shared_memory=getattr(properties, "shared_memory_per_block_optin"),  # noqa: B009  (absent from torch's stubs)
        memory=properties.total_memory,
        l2=properties.L2_cache_size,
    )


def short_name(device_name: str) -> str:
    """ "NVIDIA H100 80GB HBM3" -> "h100"; a GPU that is not described keeps its whole name: "nvidia l4" -> "l4"."""
    for name in DESCRIBED:
        if re.search(rf"\b{name}\b", device_name, re.IGNORECASE):
            return name
    return re.sub(r"[^a-z0-9]+", "_", device_name.lower().removeprefix("nvidia")).strip("_")


def install(target: GpuTarget) -> None:
    """Makes torch and Triton of this process report `target`, for good. Call it in a worker, before importing Helion.

    Only questions about the device are answered; nothing can be launched or allocated afterwards.
    """
    if torch.version.cuda is None:
        ctypes.CDLL(str(_guard_library()), mode=ctypes.RTLD_GLOBAL)
    properties = _properties(target)
    _answer_for_torch(target, properties)
    _answer_for_triton(target)


def _guard_library() -> Path:
    # By name: it is compiled, and its import would make all of hdispatch a part of what records depend on.
    door = sys.modules["hdispatch._C"].__file__
    assert door is not None
    library = Path(door).with_name(GUARD_LIBRARY)  # each torch has its own
    if not library.is_file():
        raise BuildError(
            f"there is no {library}; torch {torch.__version__} has no CUDA, so building needs it: "
            "reinstall hdispatch (`pip install --no-build-isolation .`)"
        )
    return library


def _properties(target: GpuTarget) -> types.SimpleNamespace:
    """Stands in for `torch.cuda.get_device_properties`; clock rates and limits are those of data-center GPUs since 2020."""
    return types.SimpleNamespace(
        name=target.device_name,
        major=target.major,
        minor=target.minor,
        multi_processor_count=target.sm_count,
        total_memory=target.memory,
        L2_cache_size=target.l2,
        shared_memory_per_block=49152,
        shared_memory_per_block_optin=target.shared_memory,
        shared_memory_per_multiprocessor=target.shared_memory + 1024,
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=2048,
        max_threads_per_block=1024,
        warp_size=32,
        clock_rate=1980000,
        memory_clock_rate=2619000,
        memory_bus_width=5120,
        gcnArchName="",
        uuid="0",
        is_integrated=False,
    )


def _always(value: object) -> Callable[..., Any]:
    return lambda *_args, **_kwargs: value


def _answer_for_torch(target: GpuTarget, properties: types.SimpleNamespace) -> None:
    from torch._dynamo.device_interface import CudaInterface
    from torch._subclasses import fake_tensor

    answers = {
        "is_available": True,
        "is_initialized": False,
        "device_count": 1,
        "current_device": 0,
        "get_device_properties": properties,
        "get_device_capability": (target.major, target.minor),
        "get_device_name": target.device_name,
    }
    for name, value in answers.items():
        setattr(torch.cuda, name, _always(value))
    # Inductor, which Helion generates code with, asks through this class.
    for name, value in (answers | {"get_compute_capability": target.capability}).items():
        if hasattr(CudaInterface, name):
            setattr(CudaInterface, name, staticmethod(_always(value)))
    setattr(CudaInterface.Worker, "get_device_properties", staticmethod(_always(properties)))  # noqa: B010
    # A fake CUDA tensor must not start CUDA.
    setattr(fake_tensor, "init_gpu_context", _always(None))  # noqa: B010
    setattr(fake_tensor.FakeTensorMode, "avoid_device_init", property(_always(True)))  # noqa: B010


def _answer_for_triton(target: GpuTarget) -> None:
    import triton  # type: ignore[import-untyped]
    from triton.backends.compiler import GPUTarget  # type: ignore[import-untyped]
    from triton.backends.driver import DriverBase  # type: ignore[import-untyped]

    def nothing_runs(_self: object) -> None:
        raise BuildError("this process only compiles: there is no device to run or time anything on")

    # A class of its own, because DriverBase is abstract in these members, and Triton calls no others when compiling.
    answers = {
        "get_current_target": GPUTarget("cuda", target.capability, 32),
        "get_active_torch_device": torch.device("cuda", 0),
        "get_current_device": 0,
        "get_current_stream": 0,
        "set_current_device": None,
        "get_device_interface": torch.cuda,
    }
    members: dict[str, Any] = {name: _always(value) for name, value in answers.items()}
    members |= {
        "__init__": _always(None),
        "is_active": classmethod(_always(True)),
        "map_python_to_cpp_type": lambda _self, kind: kind,
        "get_benchmarker": nothing_runs,
        "get_empty_cache_for_benchmark": nothing_runs,
    }
    triton.runtime.driver.set_active(type("DescribedDriver", (DriverBase,), members)())
