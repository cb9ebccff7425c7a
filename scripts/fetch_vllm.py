#!/usr/bin/env python3
"""Put vLLM's Python, without its binaries, and what it imports into a folder: for tests/vllm, which simulate its kernels.

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

VLLM = "vllm==0.33.0"
#: 3,700 files of Python stay; binaries and the sources of kernels that are compiled at run time go.
SKIP = re.compile(r"\.so$|^vllm/(vllm-rs$|third_party/(deep_gemm|fmha_sm100|tml_fa4)/)")
#: With what they need.
PACKAGES = [
    *("aiohttp", "blake3", "cachetools", "cbor2", "cloudpickle", "einops", "fastapi==0.136.3", "httpx2", "huggingface_hub"),
    *("jsonschema", "loguru", "msgspec", "openai==3.52.0", "openai-harmony", "orjson", "partial-json-parser", "psutil"),
    *("prometheus-fastapi-instrumentator", "prometheus_client", "py-cpuinfo", "pybase64", "pydantic", "python-json-logger"),
    *("pyyaml", "pyzmq", "regex", "requests", "safetensors", "sentencepiece", "setproctitle", "six", "sniffio", "starlette"),
    *("tiktoken", "tokenizers", "transformers>=5.16.1,<5.21.0", "uvloop", "watchfiles"),
]
#: Without: they need torch, which is there.
ALONE = ["compressed-tensors==0.17.0", "llguidance==1.7.6", "xgrammar==0.2.8"]


def main() -> None:
    """Download and unpack."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    folder: Path = parser.parse_args().folder
    done = folder / "complete"
    if done.is_file() and done.read_text() == VLLM:
        return
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    with tempfile.TemporaryDirectory() as wheels:
        platform = ["--only-binary=:all:", "--platform", "manylinux_2_28_x86_64"]
        subprocess.run([*pip, "download", "--no-deps", *platform, "-d", wheels, VLLM], check=True)
        with zipfile.ZipFile(next(Path(wheels).glob("vllm-*.whl"))) as wheel:
            wheel.extractall(folder / "tree", [name for name in wheel.namelist() if not SKIP.search(name)])
    into = ["install", "--upgrade", "--target", str(folder / "deps")]
    subprocess.run([*pip, *into, *PACKAGES], check=True)
    subprocess.run([*pip, *into, "--no-deps", *ALONE], check=True)
    done.write_text(VLLM)


if __name__ == "__main__":
    main()
