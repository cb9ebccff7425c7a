"""benchmarks/bit_equality.py with references in the place of the ops: every op runs through it, and what differs is counted."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import hdispatch
import pytest
import torch
from hdispatch.compile import buildable_ops

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "bit_equality.py"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def program() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bit_equality", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["bit_equality"] = module  # where its dataclass looks for the module
    spec.loader.exec_module(module)
    return module


def test_every_op_runs(program: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "ROWS", 2)
    for op in buildable_ops():
        if op in program.GEMMS:
            continue
        spec = hdispatch.registry.spec(op)
        names = {arg.name for arg in spec.args if getattr(arg, "mutated", False)}
        seen = set()
        for variant, sizes in program.cases(spec):
            if sizes != program_sizes(program, spec):
                continue
            found = program.measure(spec, variant, sizes, 1, spec.reference, spec.reference, CPU)
            assert found, (op, variant)
            assert all(difference.differ == 0 < difference.elements for difference in found.values()), (op, variant)
            seen |= set(found)
        # An optional output is absent in some variants, not in all.
        assert seen == names, op


def program_sizes(program: ModuleType, spec: Any) -> dict[str, int]:
    """The first size of an op: one is enough, and references are slow."""
    return next(sizes for _, sizes in program.cases(spec))


def test_counts(program: ModuleType) -> None:
    difference = program.Difference()
    got = torch.tensor([1.0, -0.0, 2.0, 3.0])
    want = torch.tensor([1.0, 0.0, 2.0, 3.0])
    want[2], want[3] = torch.nextafter(want[2], torch.tensor(9.0)), 6.0
    difference.add(got, want)
    assert (difference.elements, difference.differ, difference.further, difference.worst) == (4, 3, 1, 0.5)
    codes = program.Difference()
    codes.add(
        torch.tensor([0x01, 0x81, 0x7E, 0x10], dtype=torch.uint8).view(torch.float8_e4m3fn),
        torch.tensor([0x81, 0x81, 0x7D, 0x10], dtype=torch.uint8).view(torch.float8_e4m3fn),
    )
    assert (codes.elements, codes.differ, codes.further) == (4, 2, 1)


def test_a_wrong_op_is_seen_and_its_worst_case_named(program: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "ROWS", 2)
    spec = hdispatch.registry.spec("rms_norm")

    def wrong(result: torch.Tensor, *args: Any) -> None:
        spec.reference(result, *args)
        if result.dtype == torch.float16 and result.shape[-1] == 64:
            result.view(torch.int16).view(-1)[0] ^= 1

    rows = program.of_op(spec, 1, spec.reference, wrong, CPU)
    differing = [row for row in rows if row["differ"]]
    assert differing
    assert {(row["sizes"]["K"], row["variant"].split("+")[0]) for row in differing} == {(64, "float16")}
    (line,) = program.summary("rms_norm", rows)
    for part in (f" {len(differing)} of ", "float16", "'K': 64"):
        assert part in line
