"""Kernels interpreted on the CPU: a program tries cases and prints which fail; a test runs it and reads that."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

MARK = "FAILURES "


def report(cases: Iterable[tuple[str, Callable[[], object]]]) -> None:
    """Prints how many cases there were, and which raised what."""
    count, failures = 0, []
    for name, run in cases:
        count += 1
        try:
            run()
        except Exception as error:  # told as a failure
            failures.append(f"{name}: {type(error).__name__}: {error}")
    sys.stdout.write(MARK + json.dumps([count, failures]) + "\n")


def ask(program: str, *arguments: str) -> tuple[int, list[str]]:
    """What a program of this folder reports, of which Triton's interpreter is switched on as it starts."""
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name(program)), *arguments]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    assert len(lines) == 1, done.stderr
    count, failures = json.loads(lines[0].removeprefix(MARK))
    return count, failures
