"""Importing under another torch than the extension was compiled against is a clear error, not a crash."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hdispatch import _build_info

CODE = """
import sys
import torch
torch.__version__ = torch.torch_version.TorchVersion(sys.argv[1])
try:
    import hdispatch
    print("imported")
except ImportError as error:
    assert type(error) is ImportError
    assert "hdispatch._C" not in sys.modules
    print(error)
"""


def import_under(version: str) -> str:
    """What importing under that torch says, in a process of its own."""
    done = subprocess.run([sys.executable, "-c", CODE, version], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("version", ["2.10.0", "2.99.1+cu140", "1.0"])
def test_another_version_of_torch(version):
    assert import_under(version) == (
        f"hdispatch's extension was compiled against torch {_build_info.TORCH_VERSION}, but torch {version} is installed. "
        "Rebuild it: pip install --no-build-isolation --force-reinstall --no-deps hdispatch (or . in a checkout)"
    )


def test_another_build_of_the_same_version():
    # One build of the extension serves the CPU and the CUDA builds of a torch.
    assert import_under(_build_info.TORCH_VERSION.split("+")[0] + "+cu999") == "imported"
