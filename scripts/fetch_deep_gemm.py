#!/usr/bin/env python3
"""Pack DeepGEMM as vLLM ships it, for `bench ops --deep-gemm` on a machine without a network.

The archive has the package in a folder deep_gemm.
Its headers, those of CUTLASS among them, are what its kernels are compiled with when they are called, by nvcc 12.9 or later.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from fetch_vllm import VLLM

PACKAGE = "vllm/third_party/deep_gemm/"
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", type=Path, metavar="ARCHIVE.tar.xz")
    parser.add_argument("wheel", type=Path, metavar="WHEEL", nargs="?", help="vLLM's; else it is downloaded")
    given = parser.parse_args()
    archive: Path = given.archive
    if given.wheel is not None and not zipfile.is_zipfile(given.wheel):
        sys.exit(f"{given.wheel} is no wheel; give vLLM's, {VLLM}")
    with tempfile.TemporaryDirectory() as folder:
        if given.wheel is None:
            platform = ["--no-deps", "--only-binary=:all:", "--platform", "manylinux_2_28_x86_64"]
            pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "download"]
            subprocess.run([*pip, *platform, "-d", folder, VLLM], check=True)
        with zipfile.ZipFile(given.wheel or next(Path(folder).glob("vllm-*.whl"))) as wheel:
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
