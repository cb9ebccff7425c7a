"""scripts/vllm_kernel_tests.py: what it runs, what it makes of outcomes, crashes and time limits; vLLM is a stand-in."""

from __future__ import annotations

import argparse
import importlib
import io
import json
import sys
import tarfile
import time
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
FILE = "core/test_fused_qk_norm_rope.py"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module("vllm_kernel_tests")


@pytest.fixture
def plugin(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module("vllm_kernel_tests_plugin")


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A folder with packages `tests` and `vllm`, and no tests; processes there load bundles with the null driver."""
    folder = tmp_path / "tree"
    for package in ("tests", "tests/kernels", "tests/kernels/core", "vllm", "vllm/utils"):
        (folder / package).mkdir(parents=True)
        (folder / package / "__init__.py").touch()
    (folder / "vllm/utils/torch_utils.py").write_text(
        "import functools, hdispatch\n"
        "hdispatch.load = functools.partial(hdispatch.load, driver='null')\n"
        "def set_random_seed(seed): ...\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return folder


@pytest.fixture
def run(script, tree, tmp_path):
    """Run the source of a test file on "vLLM's kernels": run(source, **options) -> Run."""

    def go(source, sample=0, timeout=120.0):
        (tree / "tests/kernels" / FILE).write_text(source)
        options = argparse.Namespace(logs=tmp_path, tests=tree, sample=sample, timeout=timeout, jobs=2)
        return script.run_file(FILE, None, options, time.monotonic() + 300)

    return go


def named(outcomes):
    return {name.partition("::")[2]: outcome for name, outcome in outcomes.items()}


def test_outcomes(run):
    found = run(
        "import pytest, torch\n"
        "from tests.utils import large_gpu_test\n"
        "def test_good(): torch.set_default_device('meta')\n"
        "def test_after(): assert torch.zeros(1).device.type == 'cpu'\n"
        "def test_bad(): assert 1 == 2\n"
        "def test_other(): pytest.skip('no')\n"
        "@large_gpu_test(min_gb=1 << 20)\n"
        "def test_large(): ...\n"
        "@pytest.fixture\n"
        "def broken(): raise ValueError('broken')\n"
        "def test_setup(broken): ...\n"
    )
    wanted = {"good": "passed", "after": "passed", "bad": "failed", "other": "skipped", "large": "skipped", "setup": "failed"}
    assert named(found.outcomes) == {f"test_{name}": outcome for name, outcome in wanted.items()}
    assert found.counts() == {"passed": 2, "failed": 2, "skipped": 2, "not run": 0}
    messages = {name.partition("::")[2]: message for name, message in found.messages.items()}
    assert "assert 1 == 2" in messages["test_bad"]
    assert messages["test_setup"].startswith("setup: ")


def test_a_crash_is_the_tests(run, script):
    found = run("import os\ndef test_a(): ...\ndef test_b(): os._exit(9)\ndef test_c(): ...\n")
    assert named(found.outcomes) == {"test_a": "passed", "test_b": "failed"}
    assert found.counts()["not run"] == 1
    assert "exit status 9" in next(iter(found.messages.values()))
    assert script.gaps(found, found) == "2 of 3 tests ran on vLLM's kernels: exit status 9"


def test_a_time_limit_is_nobodys(run, script):
    found = run("import time\ndef test_a(): ...\ndef test_b(): time.sleep(600)\n", timeout=20.0)
    assert named(found.outcomes) == {"test_a": "passed"}
    assert script.gaps(found, found) == "1 of 2 tests ran on vLLM's kernels: stopped after 20 s"


def test_a_file_that_cannot_be_imported_is_a_gap(run, script, capsys):
    found = run("import no_such_module\n")
    assert script.gaps(found, found) == "0 of 0 tests ran on vLLM's kernels: exit status 2"
    script.print_gaps({FILE: "why"}, {FILE: (found, found)})
    assert "No module named 'no_such_module'" in capsys.readouterr().out


def test_sample(plugin, run):
    names = [f"f.py::{function}[{i}]" for function in ("test_a", "test_b") for i in range(50)] + ["f.py::test_c"]
    kept = plugin.sample(names, 21)
    assert kept == plugin.sample(names, 21)
    assert len(kept) == len(set(kept)) == 21
    assert [sum(f"::{f}" in name for name in kept) for f in ("test_a", "test_b", "test_c")] == [10, 10, 1]
    assert plugin.sample(names, 0) == names
    assert plugin.sample([], 5) == []
    assert len(plugin.sample([f"f.py::test_cutlass_fp8_gemm_m_sweep[{i}]" for i in range(8)], 150)) == 2
    source = "import pytest\n@pytest.mark.parametrize('i', range(50))\ndef test_a(i): ...\ndef test_b(): ...\n"
    found = run(source, sample=10)
    assert found.counts()["passed"] == len(found.collected) == 10
    assert "test_b" in named(found.outcomes)


def test_ours_is_what_vllm_passes(script):
    plain = script.Run(outcomes={"a": "passed", "b": "failed", "c": "passed", "d": "passed", "e": "skipped"})
    other = script.Run(outcomes={"a": "passed", "b": "failed", "c": "failed", "d": "skipped", "e": "failed"})
    assert script.ours(plain, other) == ["c", "d"]
    assert script.ours(plain, plain) == []


def test_counters_are_sums(script, tmp_path):
    lines = [
        {"collected": ["a", "b"], "refused": {"op": "why"}},
        {"started": "a"},
        {"test": "a", "outcome": "passed", "message": "", "ops": {"op": {"hits": 2, "empty": 1, "misses": {"x": 3}}}},
        {"started": "b"},
        {"test": "b", "outcome": "passed", "message": "", "ops": {"op": {"hits": 1, "empty": 0, "misses": {"x": 1, "y": 1}}}},
    ]
    (tmp_path / "records").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = script.Run()
    found.read(tmp_path / "records")
    assert found.ops == {"op": {"hits": 3, "empty": 1, "misses": {"x": 4, "y": 1}}}
    assert found.refused == {"op": "why"}
    assert script.gaps(found, found) is None
    assert script.total([found, found])["op"] == {"hits": 6, "empty": 2, "misses": {"x": 8, "y": 2}}


def test_both_runs(script, tree, tmp_path, monkeypatch, capsys):
    """The null driver launches nothing: what a launch serves is wrong under the override alone."""
    (tree / "tests/kernels" / FILE).write_text(
        "import hdispatch, pytest, torch\n"
        "def silu_and_mul(dtype):\n"
        "    out, x = torch.full((3, 64), 7.0, dtype=dtype), torch.zeros(3, 128, dtype=dtype)\n"
        "    hdispatch.ops.silu_and_mul(out, x)\n"
        "    assert (out == 0).all()\n"
        "def test_served(): silu_and_mul(torch.bfloat16)\n"
        "def test_wrong_either_way(): assert False\n"
        "def test_without_calls(): ...\n"
    )
    bundle = fuzz_script().write_null_bundle(tmp_path / "bundle", ["silu_and_mul"])
    result, logs = tmp_path / "out.json", tmp_path / "logs"
    command = ["run", str(bundle), str(tree), "--json", str(result), "--logs", str(logs), "--files", FILE]
    monkeypatch.setattr(sys, "argv", ["vllm_kernel_tests.py", *command])
    assert script.main() == 1
    found = json.loads(result.read_text())
    served = {"silu_and_mul": {"hits": 1, "empty": 0, "misses": {}}}
    assert found["ops"] == found["files"][FILE]["ops"] == served
    assert found["files"][FILE]["vllm"] == {"passed": 2, "failed": 1, "skipped": 0, "not run": 0}
    assert found["files"][FILE]["override"] == {"passed": 1, "failed": 2, "skipped": 0, "not run": 0}
    assert found["files"][FILE]["ours"] == [f"tests/kernels/{FILE}::test_served"]
    assert found["files"][FILE]["incomplete"] is None
    said = capsys.readouterr().out
    assert f"FAILED under the override alone: tests/kernels/{FILE}::test_served" in said
    assert "1 tests fail on vLLM's own kernels" in said


def fuzz_script():
    """scripts/fuzz.py, which writes a bundle with rows of every op."""
    return importlib.import_module("fuzz")


def test_pack(script, tmp_path, monkeypatch):
    sdist, archive = tmp_path / "vllm-0.33.0.tar.gz", tmp_path / "tests.tar.xz"
    with tarfile.open(sdist, "w:gz") as tar:
        for name in [*script.PACKED, "conftest.py"]:
            entry = tarfile.TarInfo(f"vllm-0.33.0/tests/{name}")
            entry.size = len(name)
            tar.addfile(entry, io.BytesIO(name.encode()))
    monkeypatch.setattr(sys, "argv", ["vllm_kernel_tests.py", "pack", str(sdist), str(archive)])
    assert script.main() == 0
    with tarfile.open(archive) as tar:
        assert sorted(tar.getnames()) == sorted(f"tests/{name}" for name in script.PACKED)
        assert tar.extractfile(f"tests/kernels/{FILE}").read().decode() == f"kernels/{FILE}"
    monkeypatch.setattr(script, "PACKED", [*script.PACKED, "no_such_file.py"])
    with pytest.raises(SystemExit, match=r"no file vllm-0.33.0/tests/no_such_file.py"):
        script.main()
