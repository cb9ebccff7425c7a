"""`make demo`: set-up says what it does while pip is silent; the demo builds sizes of one model that its ops declare."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from pathlib import Path
from types import ModuleType

import hdispatch
import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


def script(name: str) -> ModuleType:
    found = importlib.util.spec_from_file_location(f"{name}_script", SCRIPTS / f"{name}.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def test_the_demo_builds_nine_ops_in_sizes_and_variants_of_theirs() -> None:
    demo = script("demo")
    assert len(demo.OPS) == 9
    for name in demo.OPS:
        spec = hdispatch.registry.spec(name)
        shapes = demo.shapes(spec)
        assert shapes
        assert [shape for shape in shapes if shape not in spec.shapes] == []
        chosen = demo.variants(spec)
        assert chosen
        assert all(variant.startswith("bfloat16") for variant in chosen)
        assert set(chosen) <= {variant.name for variant in spec.served_variants()}
    assert demo.variants(hdispatch.registry.spec("rms_norm_dynamic_per_token_quant")) == ["bfloat16", "bfloat16+residual"]


def test_set_up_says_what_a_slow_step_is_doing(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    setup = script("setup")
    monkeypatch.setattr(setup, "INTERVAL", 0.05)
    monkeypatch.setattr(
        setup.subprocess, "Popen", lambda _command, popen=setup.subprocess.Popen, **pipes: popen(["sleep", "0.3"], **pipes)
    )
    setup.pip("compiling the extension", "x", progress=lambda: "3 of 28 files compiled")
    said = capfd.readouterr().err.splitlines()
    assert said[0] == "set-up: compiling the extension ..."
    assert "set-up:   0 s 3 of 28 files compiled" in said
    assert said[-1] == "set-up:   done in 0 s"


def test_set_up_shows_what_pip_said_when_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    setup = script("setup")
    failing = [sys.executable, "-c", "print('no such release'); raise SystemExit(3)"]
    monkeypatch.setattr(
        setup.subprocess, "Popen", lambda _command, popen=setup.subprocess.Popen, **pipes: popen(failing, **pipes)
    )
    with pytest.raises(SystemExit, match=r"(?s)no such release.*installing torch: pip ended with status 3"):
        setup.pip("installing torch", "torch")


@pytest.mark.parametrize(
    ("torch", "triton"),
    [
        ("2.11.0+cpu", "triton>=3.6,<3.10,==3.6.*"),
        ("2.13.0", "triton>=3.6,<3.10,==3.7.*"),
        ("2.14.1+cu130", "triton>=3.6,<3.10,==3.8.*"),
        ("2.15.0", "triton>=3.6,<3.10"),
    ],
)
def test_set_up_takes_the_triton_of_the_torch_that_is_there(monkeypatch: pytest.MonkeyPatch, torch: str, triton: str) -> None:
    setup = script("setup")
    monkeypatch.setattr(setup.importlib.metadata, "version", {"torch": torch}.__getitem__)
    assert setup.with_its_triton(["helion==1.5.0", "triton>=3.6,<3.10"]) == ["helion==1.5.0", triton]


def test_set_up_leaves_a_triton_that_we_take_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an environment has stays: torch 2.13 with Triton 3.8, too."""
    setup = script("setup")
    there = {"torch": "2.13.0", "triton": "3.8.0", "helion": "1.5.0", "packaging": "26.0", "rich": "14.0"}
    there |= {"scikit-build-core": "0.11.0", "pybind11": "3.0.0"}
    monkeypatch.setattr(setup.importlib.metadata, "version", there.__getitem__)
    monkeypatch.setattr(setup, "tools", list)
    installed: list[str] = []
    monkeypatch.setattr(setup, "pip", lambda _step, *requirements: installed.extend(requirements))
    monkeypatch.setattr(sys, "argv", ["setup.py", "--torch", "torch==2.13.0", "--extras", "build", "--only-tools"])
    setup.main()
    assert installed == []
    there["triton"] = "3.5.1"
    setup.main()
    assert len(installed) == 1
    assert installed[0].startswith("triton>=")
    assert installed[0].endswith(",==3.7.*")


def test_set_up_counts_the_files_that_this_build_compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    setup = script("setup")
    monkeypatch.setattr(setup, "ROOT", tmp_path)
    start = time.time() - 10
    assert setup.compiled(start) == ""
    folder = tmp_path / "build" / "cp311"
    folder.mkdir(parents=True)
    (folder / "compile_commands.json").write_text(json.dumps([{"file": name} for name in ("a.cpp", "b.cpp", "c.cpp")]))
    for name, age in (("a.cpp.o", 0), ("b.cpp.o", 100)):
        (folder / name).write_text("")
        os.utime(folder / name, (time.time() - age,) * 2)
    assert setup.compiled(start) == "1 of 3 files compiled"
