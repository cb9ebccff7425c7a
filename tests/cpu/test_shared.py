"""What xdist's workers share is made once, whatever becomes of who makes it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import shared

PROGRAM = f"""
import os, sys, time
sys.path.append({str(Path(shared.__file__).parent)!r})
import pathlib, shared, types
base = pathlib.Path(sys.argv[1])
base.mkdir(exist_ok=True)

def make(folder):
    (folder / "begun").touch()
    with (base.parent / "makers").open("a") as file:
        file.write("m")
    time.sleep(float(sys.argv[2]))
    (folder / "end").touch()

made = shared.folder(types.SimpleNamespace(getbasetemp=lambda: base), "thing", make)
print(made, sorted(path.name for path in made.iterdir()))
"""


def begun(base: Path, seconds: float, worker: str | None = "gw0") -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_XDIST_WORKER"}
    environment |= {} if worker is None else {"PYTEST_XDIST_WORKER": worker}
    command = [sys.executable, "-c", PROGRAM, str(base), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def test_two_workers_make_it_once(tmp_path):
    processes = [begun(tmp_path / name, 1, name) for name in ("gw0", "gw1")]
    said = {process.communicate(timeout=60)[0] for process in processes}
    assert said == {f"{tmp_path / 'shared' / 'thing'} ['begun', 'end']\n"}
    assert (tmp_path / "makers").read_text() == "m"


def test_without_xdist_it_is_in_the_runs_own_folder(tmp_path):
    said = [begun(tmp_path / name, 0, None).communicate(timeout=60)[0] for name in ("a", "a", "b")]
    assert said == [f"{tmp_path / name / 'shared' / 'thing'} ['begun', 'end']\n" for name in ("a", "a", "b")]
    assert (tmp_path / "makers").read_text() == "mm"


def test_of_one_that_died_another_begins_anew(tmp_path):
    first = begun(tmp_path / "gw0", 100)
    end = time.monotonic() + 60
    while not (tmp_path / "makers").exists() and time.monotonic() < end:
        time.sleep(0.02)
    (tmp_path / "shared" / "thing" / "half").touch()
    second = begun(tmp_path / "gw1", 0, "gw1")
    with pytest.raises(subprocess.TimeoutExpired):
        second.wait(1)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert second.communicate(timeout=60)[0] == f"{tmp_path / 'shared' / 'thing'} ['begun', 'end']\n"
    assert (tmp_path / "makers").read_text() == "mm"


def test_a_failure_is_everyones_who_asks(tmp_path, monkeypatch):
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    factory = SimpleNamespace(getbasetemp=lambda: tmp_path)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            shared.value(factory, "number", lambda: 1 // 0)
    assert shared.value(factory, "number", lambda: {"a": [1, None]}) == {"a": [1, None]}
    assert shared.value(factory, "number", lambda: 1 // 0) == {"a": [1, None]}
