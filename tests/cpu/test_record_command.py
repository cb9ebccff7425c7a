"""`hdispatch record`: the processes of a command, its signals and exit code, vLLM's warm-up registry."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hdispatch import recording
from hdispatch.bundle_reader import read_bundle
from hdispatch.cli.main import main
from hdispatch.compile import build
from recording_runs import DESCRIBED, KERNELS, write_project


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A folder with the kernels of a user, and a run of them."""
    return write_project(tmp_path_factory.mktemp("recorded"))


def test_a_command_is_recorded_in_all_of_its_processes(project, tmp_path, capfd, monkeypatch):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, subprocess\n"
        + "if len(sys.argv) == 1:\n    raise SystemExit(subprocess.run([sys.executable, __file__, 'child']).returncode + 3)\n"
        + DESCRIBED.format(gpu="h100").replace(
            "from hdispatch.compile import target\n", "from hdispatch.compile import target\n"
        )
        + KERNELS.replace("import triton\n", "import torch\nimport triton\n", 1)
        + "from triton.runtime.jit import MockTensor\n"
        + "p = MockTensor(torch.float32)\nplain.warmup(p, p, 7, cube, tl.float32, (1, 2), BLOCK=64, grid=(1,))\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(project))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    assert main(["record", "--out", str(tmp_path / "r.jsonl"), "--", sys.executable, str(script)]) == 3
    assert "1 specialization of 1 kernel, 1 of them new" in capfd.readouterr().out
    _, (line,) = recording.read([tmp_path / "r.jsonl"])
    assert (line["module"], line["qualname"]) == ("__main__", "plain")
    report = build([], "a100", tmp_path / "b", cache=tmp_path / "cache", record=[tmp_path / "r.jsonl"], jobs=1)
    assert (report.recorded, report.notes) == (1, []), "a script's definitions are run, and nothing that it does"
    manifest, _ = read_bundle(tmp_path / "b")
    assert manifest["recorded"][0]["kernel"] == "__main__.plain"
    assert manifest["target"]["arch"] == "sm_80"


def test_a_command_of_which_no_python_was_recorded_is_told_of(tmp_path, capfd):
    for arguments, said in (["-I", "-c", "pass"], True), (["-E", "-c", "pass"], True), (["-c", "pass"], False):
        assert main(["record", "--out", str(tmp_path / "r.jsonl"), "--", sys.executable, *arguments]) == 0
        out, err = capfd.readouterr()
        assert "0 specializations of 0 kernels" in out
        assert ("no Python process of the command was recorded" in err) == said


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 3), (signal.SIGTERM, 128 + signal.SIGTERM), (signal.SIGHUP, 128 + signal.SIGHUP)]
)
def test_an_ended_command_is_told_of_when_it_has_ended(project, tmp_path, number, code):
    """A terminal interrupts the command and the recorder, a supervisor signals the recorder alone."""
    script = tmp_path / "server.py"
    script.write_text(
        "import signal, sys, time\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        + DESCRIBED.format(gpu="h100")
        + "import torch, user_kernels\nfrom triton.runtime.jit import MockTensor\n"
        + "p = MockTensor(torch.float32)\nuser_kernels.moded.warmup(p, p, 1, grid=(1,))\n"
        + "try:\n    print('ready', flush=True)\n    time.sleep(100)\n"
        + "except KeyboardInterrupt:\n    time.sleep(0.5)\n    sys.exit(3)\n"
    )
    recorder = "import signal, sys\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    recorder += "from hdispatch.cli.main import main\nsys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", recorder, "record", "--out", str(tmp_path / "r.jsonl"), "--", sys.executable, str(script)]
    variables = {**os.environ, "PYTHONPATH": str(project), "TRITON_CACHE_DIR": str(tmp_path / "triton")}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=variables, start_new_session=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    assert (process.returncode, said.split(": ")[1]) == (code, "1 specialization of 1 kernel, 1 of them new\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--vllm-warmup", "{script}"], "--vllm-warmup takes --target, one of a100, h100, h200, "),
        (["--vllm-warmup", "{script}", "--target", "h300"], "; got h300"),
        (["--vllm-warmup", "{script}s", "--target", "h100"], "no such file; --vllm-warmup takes a Python script"),
        (["--target", "h100", "--", "true"], "--target is --vllm-warmup's: a command is recorded on the GPU"),
    ],
)
def test_warm_ups_of_vllm_that_are_refused(tmp_path, capfd, arguments, words):
    script = tmp_path / "register.py"
    script.write_text("")
    given = [each.format(script=script) for each in arguments]
    assert main(["record", "--out", str(tmp_path / "r.jsonl"), *given]) == 1
    assert words in capfd.readouterr().err


@pytest.mark.skipif(getattr(importlib.util.find_spec("vllm"), "origin", None) is not None, reason="vLLM is installed")
def test_a_warm_up_without_vllm_says_so(tmp_path, capfd):
    (tmp_path / "register.py").write_text("")
    given = ["--vllm-warmup", str(tmp_path / "register.py"), "--target", "h100"]
    assert main(["record", "--out", str(tmp_path / "r.jsonl"), *given]) == 1
    assert "--vllm-warmup needs vLLM 0.33 or later, which has a registry of warm-ups: No module" in capfd.readouterr().err


@pytest.mark.parametrize("theirs", [None, "print('theirs')\n"])
def test_processes_start_as_they_did(tmp_path, capfd, monkeypatch, theirs):
    """With a sitecustomize of the machine's, which runs once, and without; nothing else is said."""
    site = tmp_path / "site"
    site.mkdir()
    if theirs is not None:
        (site / "sitecustomize.py").write_text(theirs)
    monkeypatch.setenv("PYTHONPATH", str(site))
    assert main(["record", "--out", str(tmp_path / "r.jsonl"), "--", sys.executable, "-c", "print('ours')"]) == 0
    found = capfd.readouterr()
    assert found.out.splitlines()[:-1] == [*(["theirs"] if theirs else []), "ours"]
    assert found.err == ""
