#!/usr/bin/env python3
"""Pack DeepGEMM as vLLM ships it, for `bench ops --deep-gemm` on a machine without a network.

usage: fetch_deep_gemm.py ARCHIVE.tar.xz [WHEEL]      the package, in a folder deep_gemm; of vLLM's WHEEL, else of a download

Its headers, those of CUTLASS among them, are what its kernels are compiled with when they are called, by nvcc 12.9 or later.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from fetch_vllm import VLLM

PACKAGE = "vllm/third_party/deep_gemm/"
HEADERS = ("include/cutlass/arch/barrier.h", "include/cute/tensor.hpp")
#: Headers that the kernels include must be there: without them nothing can be compiled.
NEEDED = (
    "__init__.py",
    "_C.py",
    "include/deep_gemm/impls/sm90_fp8_gemm_1d2d.cuh",
    "include/cutlass/arch/barrier.h",
    "include/cute/tensor.hpp",
)


def main() -> None:
    """Download, pack."""
    if len(sys.argv) not in (2, 3):
        sys.exit(f"{len(sys.argv) - 1} arguments; give ARCHIVE.tar.xz and, if it is there, vLLM's WHEEL")
    archive, *given = (Path(word) for word in sys.argv[1:])
    if given and not zipfile.is_zipfile(given[0]):
        sys.exit(f"{given[0]} is no wheel; give vLLM's, {VLLM}")
    with tempfile.TemporaryDirectory() as folder:
        if not given:
            platform = ["--no-deps", "--only-binary=:all:", "--platform", "manylinux_2_28_x86_64"]
            pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "download"]
            subprocess.run([*pip, *platform, "-d", folder, VLLM], check=True)
        with zipfile.ZipFile(given[0] if given else next(Path(folder).glob("vllm-*.whl"))) as wheel:
            names = [name for name in wheel.namelist() if name.startswith(PACKAGE)]
            missing = [name for name in NEEDED if PACKAGE + name not in names]
            if missing:
                sys.exit(f"{wheel.filename} has no {', '.join(missing)} in {PACKAGE}; {VLLM} has")
            wheel.extractall(folder, names)
        with tarfile.open(archive, "w:xz") as packed:
            packed.add(Path(folder, PACKAGE), "deep_gemm")
    print(f"{archive}: {len(names)} files, {archive.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
