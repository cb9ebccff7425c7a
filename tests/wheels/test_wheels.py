"""A wheel of scripts/wheels.py in a fresh environment of each torch: install, first served call, the CPU tests' smoke part.

    HDISPATCH_WHEEL=dist/hdispatch-….whl HDISPATCH_WHEEL_TORCH="torch==2.13.0 torch==2.14.1" pytest tests/wheels

`make test-wheels` builds the wheel and runs this. Each environment gets its torch by pip, dependencies too.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WHEEL = os.environ.get("HDISPATCH_WHEEL", "")
TORCH = os.environ.get("HDISPATCH_WHEEL_TORCH", "").split()
#: Tests of the doors, of bundles and of imports: what depends on torch's binary interface.
SMOKE = ("test_doors.py", "test_arguments.py", "test_override.py", "test_sequence.py", "test_bundle.py", "test_metrics.py")
#: Seconds from `pip install` of a wheel that is there to the first call that is served.
MOST_SECONDS = 10

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (WHEEL and TORCH), reason="set HDISPATCH_WHEEL and HDISPATCH_WHEEL_TORCH, or `make test-wheels`"),
]
FIRST_CALL = """
import pathlib, sys, tempfile
import torch
import hdispatch
sys.path.insert(0, sys.argv[1])
import toy
assert "site-packages" in hdispatch.__file__, hdispatch.__file__
folder = pathlib.Path(tempfile.mkdtemp())
toy.write(folder)
hdispatch.load(folder, driver="null")
with hdispatch.strict():
    hdispatch.ops.toy(*toy.arguments(4, 64))
    torch.ops.hdispatch.toy(*toy.arguments(4, 64))
assert hdispatch.stats()["toy"]["hits"] == 2
print(torch.__version__, pathlib.Path(hdispatch._C.__file__).parent.name)
"""


def run(*command: str, **options: object) -> str:
    """What the command prints; its failure is the test's, with all that it printed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1800, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return str(done.stdout)


@pytest.fixture(scope="module", params=TORCH)
def python(request, tmp_path_factory) -> str:
    """The interpreter of a new environment with that torch and what tests need, without a compiler in its PATH."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    made = str(folder / "bin" / "python")
    run(made, "-m", "pip", "install", "-q", request.param, "numpy", "pytest", "hypothesis", "prometheus_client")
    return made


@pytest.fixture
def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")} | {
        "CC": "false",
        "CXX": "false",
    }


def test_install_to_first_call(python, environment, tmp_path):
    run(python, "-c", "import torch", env=environment)  # its files are read once
    start = time.monotonic()
    run(python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--force-reinstall", WHEEL, env=environment)
    printed = run(python, "-c", FIRST_CALL, str(ROOT / "tests" / "support"), env=environment, cwd=tmp_path)
    seconds = time.monotonic() - start
    version, door = printed.split()
    assert door == "torch_" + "_".join(version.split(".")[:2])
    assert seconds < MOST_SECONDS, f"{seconds:.1f} s"
    sys.stdout.write(f"torch {version}: {seconds:.1f} s from install to first call\n")


def test_smoke(python, environment, tmp_path):
    files = [str(ROOT / "tests" / "cpu" / name) for name in SMOKE]
    # torch.compile's inductor needs a compiler.
    options = ["-q", "-p", "no:cacheprovider", "--rootdir", str(ROOT), "-k", "not inductor"]
    printed = run(python, "-P", "-m", "pytest", *options, *files, env=environment, cwd=tmp_path)
    assert " passed" in printed
    sys.stdout.write(printed.splitlines()[-1] + "\n")


def test_another_torch_is_refused(python, environment):
    code = """
import sys, torch
torch.__version__ = torch.torch_version.TorchVersion("2.99.0")
try:
    import hdispatch
except ImportError as error:
    print(error)
"""
    printed = run(python, "-c", code, env=environment)
    assert "but torch 2.99.0 is installed. Install a torch of 2." in printed


def test_it_is_manylinux():
    assert "-manylinux_2_" in Path(WHEEL).name
