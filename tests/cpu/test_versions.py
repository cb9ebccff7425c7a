"""The tools that a build names in its cache keys are those that compile."""

from __future__ import annotations

from pathlib import Path

import pytest
from hdispatch.compile import DESCRIBED, versions
from triton.backends.nvidia.compiler import get_ptxas


@pytest.mark.parametrize("name", DESCRIBED)
def test_ptxas_is_the_one_that_triton_takes(name, monkeypatch):
    for variable in ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH"):
        monkeypatch.delenv(variable, raising=False)
    target = DESCRIBED[name]
    assert versions.ptxas(target).samefile(get_ptxas(target.capability).path)
    assert versions.tool_versions("triton", target)["ptxas"].startswith(f"{get_ptxas(target.capability).version}.")


@pytest.mark.parametrize("name", DESCRIBED)
def test_the_environment_variable_that_names_ptxas_is_the_one_that_triton_reads(name, monkeypatch, tmp_path):
    target = DESCRIBED[name]
    other = tmp_path / "ptxas"
    other.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 1.2, V1.2.34'\n")
    other.chmod(0o755)
    monkeypatch.setenv(versions.ptxas_variable(target), str(other))
    assert Path(get_ptxas(target.capability).path).samefile(other)
    assert versions.tool_versions("triton", target)["ptxas"] == "1.2.34"
