"""Importing under another torch than the extension was compiled against is a clear error, not a crash."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import forked
import pytest
import torch
import toy
from hdispatch import _build_info
from hdispatch.manifest import MANIFEST_NAME

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
    done = subprocess.run(forked.python("-c", CODE, version), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


#: The release that the tests' door was compiled against, without the build's name, and its minor version.
MINOR = ".".join(torch.__version__.split(".")[:2])
BUILT = _build_info.TORCH_VERSIONS[MINOR].split("+")[0]


@pytest.mark.parametrize("version", ["2.10.0", "2.99.1+cu140", "1.0", f"{MINOR}.0.dev20260101+cu130", f"{MINOR}.0a0"])
def test_another_version_of_torch(version):
    built = ", ".join(each.split("+")[0] for each in _build_info.TORCH_VERSIONS.values())
    assert import_under(version) == (
        f"hdispatch's extension was compiled against torch {built}, but torch {version} is installed. "
        f"Install a torch of {' or '.join(_build_info.TORCH_VERSIONS)}, or rebuild hdispatch: "
        "pip install --no-build-isolation --force-reinstall --no-deps hdispatch (or . in a checkout)"
    )


def test_another_release_of_the_same_minor_version():
    assert import_under(f"{MINOR}.7") == "imported"


def test_another_build_of_the_same_version():
    # One build of the extension serves the CPU and the CUDA builds of a torch.
    assert import_under(BUILT + "+cu999") == "imported"


COMMAND = """
import sys
import torch
if sys.argv[1] == "another torch":
    torch.__version__ = torch.torch_version.TorchVersion("9.9.9")
else:
    sys.modules["hdispatch._C"] = None
sys.argv = ["/somewhere/bin/hdispatch", *sys.argv[2:]]
from hdispatch.cli.main import main
print("main was reached")
"""
WHY = {
    "another torch": "but torch 9.9.9 is installed. Install a torch of ",
    "no extension": "extension cannot be imported: import of hdispatch._C halted; None in sys.modules. Rebuild it: pip",
}


def command(problem: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`hdispatch …`, whose extension cannot be used."""
    line = forked.python("-c", COMMAND, problem, *arguments)
    return subprocess.run(line, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("problem", WHY)
def test_doctor_reports_an_extension_that_cannot_be_used(tmp_path, problem):
    toy.write(tmp_path)
    done = command(problem, "doctor", str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    assert WHY[problem] in done.stdout
    assert "is whole, but cannot be loaded without the extension" in done.stdout
    assert "would not serve calls here: extension, libcuda, " in done.stdout
    assert "triton     ok: " in done.stdout
    found = json.loads(command(problem, "doctor", "--json").stdout)
    assert not found["extension"]["ok"]
    assert WHY[problem] in found["extension"]["reason"]
    assert found["backends"]["triton"]["ok"]
    (tmp_path / MANIFEST_NAME).write_text("")
    assert "its SHA-256 is not what" in command(problem, "doctor", str(tmp_path)).stdout


@pytest.mark.parametrize("problem", WHY)
def test_other_commands_say_what_is_wrong_in_one_line(problem):
    done = command(problem, "inspect", "x")
    assert (done.returncode, done.stdout) == (1, "")
    assert WHY[problem] in done.stderr
    assert done.stderr.startswith("hdispatch: error: ")
    assert done.stderr.count("\n") == 1
    assert command(problem, "doctor", "--nonsense").returncode == 2


def test_the_module_reports_too(tmp_path):
    """`python -m hdispatch`, under another torch: one that is named so before anything is imported."""
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['hdispatch._C'] = None\n")
    line = [sys.executable, "-m", "hdispatch", "doctor"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(line, capture_output=True, text=True, timeout=120, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert WHY["no extension"] in done.stdout
