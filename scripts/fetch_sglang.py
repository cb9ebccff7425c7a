#!/usr/bin/env python3
"""Put SGLang's Python and the few small packages that its imports really use into a folder: for tests/sglang.

It makes FOLDER/tree and FOLDER/deps; nothing is done where they are complete.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

SGLANG = "sglang==0.5.23"
#: Its diffusion models are left out, and binaries, and configs of its kernels.
SKIP = re.compile(r"\.(so|json)$|^sglang/multimodal_gen/")
#: Without what they need. All else that its modules import at the top is simulated: tests/sglang/simulation.py.
PACKAGES = ["dill", "msgspec", "orjson", "pybase64"]


def main() -> None:
    """Download and unpack."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    folder: Path = parser.parse_args().folder
    done = folder / "complete"
    if done.is_file() and done.read_text() == SGLANG:
        return
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    with tempfile.TemporaryDirectory() as wheels:
        # The wheels of all Pythons have the same Python.
        platform = ["--only-binary=:all:", "--platform", "manylinux_2_34_x86_64", "--python-version", "3.11"]
        subprocess.run([*pip, "download", "--no-deps", *platform, "-d", wheels, SGLANG], check=True)
        with zipfile.ZipFile(next(Path(wheels).glob("sglang-*.whl"))) as wheel:
            wheel.extractall(folder / "tree", [name for name in wheel.namelist() if not SKIP.search(name)])
    subprocess.run([*pip, "install", "--upgrade", "--no-deps", "--target", str(folder / "deps"), *PACKAGES], check=True)
    done.write_text(SGLANG)


if __name__ == "__main__":
    main()
