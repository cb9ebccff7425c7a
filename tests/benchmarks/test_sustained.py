"""benchmarks.sustained: what it takes, how it calls for a profiler and how it orders what it measures. No GPU."""

from __future__ import annotations

import argparse
import contextlib
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hdispatch import HdispatchError

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
        (["1x2x3"], "nowhere"),
        (["1x2x3", "--json", "none/of/these.json"], "cannot write none/of/these.json: none/of is not a folder"),
        (["1x2x3", "--json", "a.json", "--once"], "not allowed with argument"),
        (["1x2x3", "--seconds", "0"], "0.0 seconds in 2 rounds; there must be more than 0, in 1 or more"),
    ],
)
def test_bad_arguments_are_named(given: list[str], said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.sustained", "nowhere", *given], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert said in done.stderr


def test_all_cells_of_a_size_are_measured() -> None:
    """Of both products and of all variants; a size that has none is named."""
    cells = [
        {"op": op, "variant": variant, "M": m, "K": 2, "N": 3}
        for m in (1, 4) for op in ("scaled_mm", "scaled_mm_blockwise") for variant in ("bfloat16", "float16")
    ]  # fmt: skip
    bundle: Any = {"candidates": {"cells": cells}}
    found = sustained.cells_of(Path("made"), bundle, [(4, 2, 3), (1, 2, 3)])
    assert [sustained.title(cell) for cell in found] == [
        f"{op} {variant} M = {m}, K = 2, N = 3"
        for m in (4, 1) for op in ("scaled_mm", "scaled_mm_blockwise") for variant in ("bfloat16", "float16")
    ]  # fmt: skip
    with pytest.raises(
        HdispatchError, match=r"made has no cell of M, K, N = \[\(9, 2, 3\)\]; it has \[\(1, 2, 3\), \(4, 2, 3\)\]"
    ):
        sustained.cells_of(Path("made"), bundle, [(1, 2, 3), (9, 2, 3)])


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
