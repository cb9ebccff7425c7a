"""Workers that are forked of a process that has imported what they import: they answer, end and are killed as others are."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import forked
import pytest
from hdispatch.compile import DESCRIBED, pool

CODE = """
import json, os, sys
print(json.dumps([os.getpid(), sys.argv, os.getcwd(), os.environ["MINE"], "torch" in sys.modules, input()]), flush=True)
print("said", file=sys.stderr)
{}
"""


def begun(tmp_path: Path, end: str, **more: str) -> subprocess.Popen[str]:
    environment = pool.environment(tmp_path, DESCRIBED["h200"]) | {"MINE": "yes"} | more
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(forked.command(CODE.format(end)), env=environment, cwd=tmp_path, text=True, **pipes)


@pytest.mark.parametrize(
    ("end", "status", "last"),
    [
        ("", 0, "said"),
        ("sys.exit(3)", 3, "said"),
        ("raise ValueError('why')", 1, "ValueError: why"),
        ("os.abort()", -signal.SIGABRT, "said"),
    ],
)
def test_pipes_environment_and_status_are_its_own(tmp_path, end, status, last):
    process = begun(tmp_path, end)
    said, errors = process.communicate("given\n", timeout=60)
    number, *others = json.loads(said)
    assert number != process.pid
    assert others == [["-c"], str(tmp_path), "yes", True, "given"]
    assert errors.splitlines()[-1] == last
    assert process.returncode == status


def test_another_seed_or_path_has_a_process_of_its_own(tmp_path):
    for more in ({"PYTHONHASHSEED": "7"}, {"PYTHONPATH": str(tmp_path)}, {"CUTE_DSL_ARCH": "sm_75"}):
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
    end = time.monotonic() + 20
    while time.monotonic() < end:
        try:
            os.kill(number, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    pytest.fail(f"process {number} runs on 20 s after its client was killed")
