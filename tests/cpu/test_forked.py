"""Processes that are forked of one that has imported what they import: they answer, end and are killed as others are."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import forked
import pytest
from hdispatch.bundle_reader import read_bundle
from hdispatch.compile import DESCRIBED, Selection, build, pool

CODE = """
import json, os, sys
print(json.dumps([os.getpid(), sys.argv, os.getcwd(), os.environ["MINE"], "torch" in sys.modules, input()]), flush=True)
print("said", file=sys.stderr)
{}
"""


def begun(tmp_path: Path, end: str, command=forked.worker, **more: str) -> subprocess.Popen[str]:
    environment = pool.environment(tmp_path, DESCRIBED["h200"]) | {"MINE": "yes"} | more
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command(CODE.format(end)), env=environment, cwd=tmp_path, text=True, **pipes)


@pytest.mark.parametrize(
    ("end", "status", "last"),
    [
        ("", 0, "said"),
        ("sys.exit(3)", 3, "said"),
        ("sys.exit('words')", 1, "words"),
        ("raise ValueError('why')", 1, "ValueError: why"),
        ("os.abort()", -signal.SIGABRT, "said"),
        ("os.kill(os.getpid(), signal.SIGINT)", 1, "KeyboardInterrupt"),
        ("import threading; threading.Timer(0.1, lambda: print('late', file=sys.stderr)).start()", 0, "late"),
        ("import atexit; atexit.register(lambda: print('last', file=sys.stderr))", 0, "last"),
    ],
)
def test_pipes_environment_and_status_are_its_own(tmp_path, end, status, last):
    process = begun(tmp_path, f"import signal; {end}")
    said, errors = process.communicate("given\n", timeout=60)
    number, *others = json.loads(said)
    assert number != process.pid
    assert others == [["-c"], str(tmp_path), "yes", True, "given"]
    assert errors.splitlines()[-1] == last
    assert process.returncode == status


def test_another_seed_or_path_has_a_process_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv(forked.FOLDER, os.environ.get(forked.FOLDER, ""))  # which `serving` takes away at its end
    with forked.serving(tmp_path / "s"):
        begun(tmp_path, "").communicate("given\n", timeout=60)  # a server is of the first environment that it forks for
        for more in (
            {"PYTHONHASHSEED": "7"},
            {"PYTHONPATH": str(tmp_path)},
            {"TRITON_INTERPRET": "1"},
            {"CUTE_DSL_ARCH": "sm_75"},
            {forked.FOLDER: str(tmp_path)},
            {f"LARGE_{number}": 100_000 * "x" for number in range(4)},  # more than a socket's message holds
        ):
            process = begun(tmp_path, "", **more)
            said, _ = process.communicate("given\n", timeout=60)
            assert json.loads(said) == [process.pid, ["-c"], str(tmp_path), "yes", False, "given"]


def test_a_worker_is_gone_when_its_client_is_killed(tmp_path):
    process = begun(tmp_path, "import time; time.sleep(100)")
    with process:
        process.stdin.write("given\n")
        process.stdin.flush()
        number = json.loads(process.stdout.readline())[0]
        process.kill()
    gone(number)


def test_a_worker_is_gone_when_the_thread_that_began_it_has_ended(tmp_path):
    """As those of `Pool.map` are: see `child.begin`."""
    found = []

    def begin() -> None:
        process = begun(tmp_path, "import time; time.sleep(100)")
        process.stdin.write("given\n")
        process.stdin.flush()
        found.append((process, json.loads(process.stdout.readline())[0]))

    thread = threading.Thread(target=begin)
    thread.start()
    thread.join()
    ((process, number),) = found
    with process:
        assert process.wait(timeout=20) == -signal.SIGKILL
    gone(number)


def gone(number: int) -> None:
    end = time.monotonic() + 20
    while time.monotonic() < end:
        try:
            os.kill(number, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    pytest.fail(f"process {number} runs on 20 s after its client was killed")


def test_servers_are_gone_when_whoever_serves_is_killed(tmp_path):
    program = (
        f"import sys; sys.path.append({str(forked.HERE)!r}); import forked, pathlib, subprocess, time\n"
        f"with forked.serving(pathlib.Path({str(tmp_path)!r})):\n"
        "    print(open('/proc/thread-self/children').read(), flush=True); time.sleep(100)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        numbers = list(map(int, process.stdout.readline().split()))
        process.kill()
    assert len(numbers) == len(forked.served())
    for number in numbers:
        gone(number)


def test_where_a_gpu_is_programs_are_begun_by_python(tmp_path, monkeypatch):
    monkeypatch.setattr(forked, "GPU", tmp_path)
    monkeypatch.setenv(forked.FOLDER, "")
    folder = tmp_path / "sockets"
    with forked.serving(folder):
        assert sorted(path.name for path in folder.iterdir()) == ["sm_100a", "sm_80", "sm_90a"]
        done = subprocess.run(forked.python("-c", SAYS), capture_output=True, text=True, check=True, timeout=60)
    assert not json.loads(done.stdout)[3]


SAYS = "import json, os, sys; print(json.dumps([__name__, sys.argv, sys.path[0], 'torch' in sys.modules, os.getcwd()]))"


def test_programs_are_begun_as_python_begins_them(tmp_path):
    """The main module, its arguments, the first folder of modules and the folder that it is in."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "says.py").write_text(SAYS)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # as the server has it
    for arguments in (
        ["-c", SAYS, "a", "-b"],
        ["-P", "-c", SAYS, "a"],
        ["-W", "ignore", "folder/says.py", "a"],
        ["-m", "folder.says", "a"],
    ):
        plain, own = (
            subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60, env=environment)
            for command in ((sys.executable, *arguments), forked.python(*arguments))
        )
        expected, found = json.loads(plain.stdout), json.loads(own.stdout)
        if "-P" in arguments:  # the first folder is Python's own library, where nothing comes before it
            expected[2] = found[2]
        assert found == [*expected[:3], "libraries" in forked.served(), expected[4]], arguments
        assert plain.stderr == own.stderr == ""


@pytest.mark.parametrize(("target", "backends"), [("h200", {"helion"}), ("h100", {"triton"})])
def test_a_build_is_the_same(tmp_path, target, backends, monkeypatch):
    """Triton's and Helion's kernels, by processes that are forked of one that believes in an H200, and by Python's own."""
    few = Selection(shapes=lambda spec: spec.shapes[:1], variants=lambda _spec: ["bfloat16"], buckets=lambda _spec: [0, 9])
    manifests = []
    for name in ("forked", "own"):
        if name == "own":
            monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
        places = {"out": tmp_path / name, "cache": tmp_path / f"{name} cache"}
        build(["dynamic_per_token_scaled_fp8_quant"], target, select=few, jobs=1, **places)
        manifests.append(read_bundle(tmp_path / name)[0])
        for row in manifests[-1]["rows"]:
            row["build_seconds"] = 0.0
    assert manifests[0] == manifests[1]
    assert {record["backend"] for record in manifests[0]["records"]} == backends
