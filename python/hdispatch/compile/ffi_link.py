"""Linking host functions with TVM FFI's ABI into the one shared library of a bundle. Needs a C compiler, no CUDA toolkit."""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

from ..errors import BuildError

SHIM = Path(__file__).with_name("ffi_shim.c")
#: The part of CuteDSL's runtime that its exported objects need: it forwards to libcudart.
RUNTIME = "libcuda_dialect_runtime_static.a"
#: The runtime that torch has loaded when the library is opened; newer than what the forwarding needs.
CUDART = "libcudart.so.13"


def runtime_archive() -> Path | None:
    """CuteDSL's static runtime for CUDA 13, if it is installed here."""
    found = importlib.util.find_spec("nvidia_cutlass_dsl")
    for folder in found.submodule_search_locations or () if found else ():
        archive = Path(folder) / "cu13" / "lib" / RUNTIME
        if archive.exists():
            return archive
    return None


def compiler() -> list[str]:
    """The C compiler: $CC, else cc or gcc or clang. BuildError if there is none."""
    if os.environ.get("CC"):
        return shlex.split(os.environ["CC"])
    found = next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)
    if not found:
        raise BuildError("linking host functions needs a C compiler, and there is none: install gcc or clang, or set $CC")
    return [found]


def link(objects: Mapping[str, bytes]) -> bytes:
    """The shared library of these object files, by name: the same bytes for the same objects.

    Each defines `__tvm_ffi_<function>` and what CuteDSL's `export_to_c` puts beside it. BuildError with what the compiler
    says; CuteDSL's runtime is linked where it is installed.
    """
    archive = runtime_archive()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name, data in objects.items():
            (root / f"{name}.o").write_bytes(data)
        shutil.copy(SHIM, root / SHIM.name)
        sources = [*(f"{name}.o" for name in sorted(objects)), SHIM.name]  # the shim before the archive: see there
        if archive:
            # Stands in for the real one, which is not needed to link: its name goes into the library.
            _run(root, "-shared", f"-Wl,-soname,{CUDART}", "-x", "c", os.devnull, "-o", CUDART)
            sources += [str(archive), "-Wl,--wrap=_cudaLaunchKernelEx", "-Wl,--no-as-needed", f"./{CUDART}"]
        _run(
            root,
            "-shared",
            "-fPIC",
            "-O2",
            "-std=c11",
            "-Wl,--build-id=none",
            "-s",
            *sources,
            "-o",
            "library",
            "-lpthread",
            "-ldl",
        )
        return (root / "library").read_bytes()


def _run(folder: Path, *arguments: str) -> None:
    command = [*compiler(), *arguments]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except OSError as error:
        raise BuildError(f"{command[0]} cannot be run: {error}; set $CC to a C compiler") from error
    if done.returncode:
        raise BuildError(f"{' '.join(command)} failed: {done.stderr.strip()[-2000:]}")
