"""Which tools a build uses, found without importing them: they go into every cache key and into the manifest."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ..errors import BuildError
from .target import GpuTarget

#: The Python packages that each backend generates and compiles with. An op's default backend is its first one here; configs
#: for Helion need not name theirs.
PACKAGES = {
    "triton": ("torch", "triton"),
    "helion": ("torch", "triton", "helion"),
    "cutedsl": ("nvidia-cutlass-dsl", "nvidia-cutlass-dsl-libs-cu13", "apache-tvm-ffi"),
}

#: Backends that ops with another one must be buildable without: half a gigabyte that hdispatch[build] does not bring.
OPTIONAL = ("cutedsl",)


def tool_versions(backend: str, target: GpuTarget) -> dict[str, str]:
    """Name to version of a backend's packages and of ptxas. BuildError if one is missing."""
    tools = {name: _package(name) for name in PACKAGES[backend]}
    if backend == "cutedsl":  # it comes with its own ptxas
        return tools
    return tools | {"ptxas": _ptxas_version(ptxas(target))}


def missing(backend: str) -> str | None:
    """The first of a backend's packages that is not installed."""
    for name in PACKAGES[backend]:
        try:
            version(name)
        except PackageNotFoundError:
            return name
    return None


def ptxas(target: GpuTarget) -> Path:
    """The assembler for a target: what Triton's environment variable names, else the one that comes with Triton."""
    if chosen := os.environ.get(ptxas_variable(target)):
        path = Path(chosen)
    else:
        package = importlib.util.find_spec("triton")
        roots = list(package.submodule_search_locations or ()) if package else []
        if not roots:
            raise BuildError("triton is not installed; the build wing needs it: pip install 'hdispatch[build]'")
        path = Path(roots[0]) / "backends" / "nvidia" / "bin" / ("ptxas-blackwell" if _takes_newer_ptxas(target) else "ptxas")
    if not path.is_file():
        raise BuildError(f"no ptxas at {path}; reinstall triton or set {ptxas_variable(target)}")
    return path


def ptxas_variable(target: GpuTarget) -> str:
    """The environment variable that tells Triton which ptxas to take for a target."""
    return "TRITON_PTXAS_BLACKWELL_PATH" if _takes_newer_ptxas(target) else "TRITON_PTXAS_PATH"


def _takes_newer_ptxas(target: GpuTarget) -> bool:
    """Whether Triton takes the newer of its two assemblers, which it calls Blackwell's; since 3.9 it does for Hopper too."""
    major, minor = (int(part) for part in _package("triton").split(".")[:2])
    return target.major >= (9 if (major, minor) >= (3, 9) else 10)


def _package(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError as error:
        extra = "cutedsl" if name.startswith("nvidia-cutlass-dsl") or name == "apache-tvm-ffi" else "build"
        raise BuildError(f"{name} is not installed; the build wing needs it: pip install 'hdispatch[{extra}]'") from error


@functools.cache
def _ptxas_version(path: Path) -> str:
    done = subprocess.run([str(path), "--version"], capture_output=True, text=True, check=False)
    found = re.search(r"V(\d+\.\d+\.\d+)", done.stdout)
    if done.returncode or found is None:
        raise BuildError(f"{path} --version says {done.stdout or done.stderr!r}, which is no ptxas version")
    return found.group(1)
