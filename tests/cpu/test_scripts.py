"""The scripts' --help: it tells the arguments, and does nothing else."""

from __future__ import annotations

import subprocess
from pathlib import Path

import forked
import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
#: A plug-in of pytest's, which nobody runs.
PROGRAMS = sorted(each.name for each in SCRIPTS.glob("*.py") if each.name != "vllm_kernel_tests_plugin.py")


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_does_nothing_else(tmp_path, name):
    command = forked.python(SCRIPTS / name, "--help")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: ")
    assert list(tmp_path.iterdir()) == []
