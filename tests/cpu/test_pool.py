"""The build's worker processes: answers, refusals, processes that end or hang, errors in threads. Workers are stand-ins."""

from __future__ import annotations

import importlib.util
import itertools
import os
import re
import sys
import time
from pathlib import Path

import pytest
from hdispatch.compile import DESCRIBED, pool
from hdispatch.compile.build_unit import Unit
from hdispatch.errors import BuildError

#: Answers as worker.py does; a unit's config says how.
WORKER = """
import json, os, sys, time
assert json.loads(sys.stdin.readline())["store"] == "cache"
for line in sys.stdin:
    how = json.loads(line)["unit"]["config"]["how"]
    if how == "die":
        print("out of luck", file=sys.stderr, flush=True)
        os._exit(3)
    time.sleep(60 if how == "hang" else 0)
    answer = {"error": "no such tile", "detail": "line 7"} if how == "refuse" else {"built": [os.getpid()]}
    print(json.dumps(answer), flush=True)
"""


@pytest.fixture
def workers(monkeypatch):
    monkeypatch.setattr(pool, "_COMMAND", (sys.executable, "-c", WORKER))
    with pool.Pool(DESCRIBED["h200"], Path("cache")) as found:
        yield found


def test_workers_take_no_setting_of_the_caller_that_triton_reads(monkeypatch, tmp_path):
    knobs = Path(importlib.util.find_spec("triton").origin).with_name("knobs.py").read_text()
    read = set(re.findall(r'env_?\w*\("([A-Z]\w*)"', knobs)) - {"CC"}  # which compiles host code alone
    read = {name for name in read if not name.startswith("AMDGCN_")}
    assert {"TRITON_DEFAULT_FP_FUSION", "PTXAS_OPTIONS", "DISABLE_PTXAS_OPT"} <= read
    for name in read:
        monkeypatch.setenv(name, "caller's")
    kept = pool.environment(tmp_path, DESCRIBED["h200"])
    assert not {name for name in read if kept.get(name) == "caller's"}


def unit(how: str = "well", filler: str = "") -> Unit:
    return Unit("some.op", "triton", "any", {"K": 64}, {"how": how, "filler": filler}, (0,))


def gone(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    return False


def test_one_process_answers_one_request_after_the_other(workers):
    first = workers.build(unit(), {})
    assert workers.build(unit(filler="x" * 2**20), {}) == first, "a request longer than a pipe holds"


def test_a_refusal_names_the_unit_and_costs_no_process(workers):
    first = workers.build(unit(), {})
    with pytest.raises(BuildError, match=r"^op any K=64 buckets 0: no such tile\nline 7$") as error:
        workers.build(unit("refuse"), {})
    assert not isinstance(error.value, pool.WorkerLost)
    assert workers.build(unit(), {}) == first


def test_a_process_that_ends_is_replaced(workers):
    first = workers.build(unit(), {})
    with pytest.raises(pool.WorkerLost, match=r"(?s)^op any K=64 buckets 0: .*status 3; it said: out of luck"):
        workers.build(unit("die"), {})
    assert workers.build(unit(), {}) != first


def test_a_process_that_hangs_is_ended(workers):
    (first,) = workers.build(unit(), {})
    start = time.monotonic()
    with pytest.raises(pool.WorkerLost, match=r"has not answered for 0\.2 s"):
        workers.build(unit("hang"), {}, 0.2)
    assert time.monotonic() - start < 30
    assert gone(first)


def test_map_gives_every_result_and_ends_its_processes(workers):
    found = dict(workers.map(lambda index: (index, workers.build(unit(), {})[0]), 6, 2))
    assert [found[index][0] for index in range(6)] == list(range(6))
    processes = {process for _, process in found.values()}
    assert len(processes) <= 2
    assert all(map(gone, processes))


def test_map_raises_the_first_error_and_waits_for_nothing(workers):
    start = time.monotonic()
    with pytest.raises(BuildError, match="no such tile"):
        list(workers.map(lambda index: workers.build(unit("refuse" if index == 1 else "hang"), {}), 4, 2))
    assert time.monotonic() - start < 30
    with pytest.raises(pool.WorkerLost, match="the run was broken off"):
        workers.build(unit(), {})


def test_leaving_map_early_ends_its_processes(workers):
    results = workers.map(lambda _: workers.build(unit(), {})[0], 4, 1)
    ((_, process),) = itertools.islice(results, 1)
    results.close()
    assert gone(process)


def test_nothing_is_started_for_nothing(workers, monkeypatch):
    monkeypatch.setattr(pool, "environment", None)
    assert list(workers.map(lambda _: None, 0, 4)) == []


@pytest.mark.parametrize("jobs", [0, -1])
def test_jobs(jobs):
    with pytest.raises(BuildError, match=f"jobs is {jobs}; it takes at least 1"):
        pool.checked_jobs(jobs)
