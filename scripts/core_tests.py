"""Configure, build and run the C++ tests in a build folder, under a sanitizer if one is named."""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def tool(name: str) -> str:
    """A tool of this environment, or the machine's."""
    own = Path(sys.executable).parent / name
    found = str(own) if own.exists() else shutil.which(name)
    if not found:
        sys.exit(f"{name} is not installed: python -m pip install cmake ninja")
    return found


def main() -> None:
    """Build and run; ends with ctest's own exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sanitize", default="", help="address,undefined or thread")
    options = parser.parse_args()
    folder = ROOT / options.folder
    ninja = tool("ninja")
    configure = [tool("cmake"), "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    configure += ["-DHDISPATCH_MODULE=OFF", "-DHDISPATCH_TESTS=ON", f"-DHDISPATCH_SANITIZE={options.sanitize}"]
    tvm_ffi = importlib.util.find_spec("tvm_ffi")
    if tvm_ffi and tvm_ffi.origin:
        configure.append(f"-DHDISPATCH_TVM_FFI={Path(tvm_ffi.origin).parent}")
    subprocess.run(configure, check=True, stdout=subprocess.DEVNULL)
    subprocess.run([tool("cmake"), "--build", str(folder), "--parallel", str(os.cpu_count())], check=True)
    status = subprocess.run([tool("ctest"), "--test-dir", str(folder), "--output-on-failure", "-j", str(os.cpu_count())])
    sys.exit(status.returncode)


if __name__ == "__main__":
    main()
