"""benchmarks.sustained: what it takes, how it calls for a profiler and how it orders what it measures. No GPU."""

from __future__ import annotations

import argparse
import contextlib
import random
import subprocess
import sys

import pytest
import torch

from benchmarks import sustained
from benchmarks.sustained import Sample


def test_sizes() -> None:
    assert sustained.sizes("512x8192x5120,1x2x3") == [(512, 8192, 5120), (1, 2, 3)]
    with pytest.raises(argparse.ArgumentTypeError, match="'512x8192'; a cell is MxKxN"):
        sustained.sizes("512x8192")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["512x8192", "--once"], "a cell is MxKxN"),
        (["1x2x3", "--rounds", "0"], "0.25 seconds in 0 rounds; there must be more than 0, in 1 or more"),
        (["1x2x3", "--seconds", "0"], "0.0 seconds in 2 rounds; there must be more than 0, in 1 or more"),
    ],
)
def test_bad_arguments_are_named(given: list[str], said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.sustained", "nowhere", *given], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert said in done.stderr


def test_each_is_called_once_in_a_range_of_its_own(monkeypatch, capsys) -> None:
    events: list[str] = []

    @contextlib.contextmanager
    def mark(name):
        events.append(f"begin {name}")
        yield
        events.append("end")

    monkeypatch.setattr(torch.cuda.nvtx, "range", mark)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: events.append("synchronize"))
    found = [
        (name, [lambda name=name: events.append(name), lambda: events.append("other weights")]) for name in ("ours", "theirs")
    ]
    sustained.call_once(iter(found))
    assert capsys.readouterr().out == "ours\ntheirs\n"
    assert events == [step for name in ("ours", "theirs") for step in ("begin once", name, "end", "synchronize")]


def test_all_run_in_each_round_in_random_order(monkeypatch) -> None:
    order: list[int] = []

    def sample(run, card, seconds):
        order.append(run)
        return Sample(float(run), 700.0, 1500.0)

    monkeypatch.setattr(sustained, "sample", sample)
    random.seed(1)
    found = sustained.measure({str(i): i for i in range(8)}, None, 0.1, 3)
    rounds = [order[at : at + 8] for at in range(0, 24, 8)]
    assert all(sorted(each) == list(range(8)) for each in rounds)
    assert rounds[0] != rounds[1], "the same order, which a clock that falls would show as a difference"
    assert found == {str(i): [Sample(float(i), 700.0, 1500.0)] * 3 for i in range(8)}
