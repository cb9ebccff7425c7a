"""Result of a run: rows, skipped paths with their reasons, and the targets that rows are compared with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict

from ..errors import HdispatchError
from .workload import MKind


class PathTime(TypedDict):
    """One measured path. Times are ns per call, the loop that makes the calls included.

    path         what was called
    op           which op or kernel, or what else was asked of it
    m            how M went from call to call; "fixed" where there is no M
    floor_ratio  median over that of the bare driver call (plain, without PDL) of the same run; None where that did not run
                 or the figure is no host time of one launch
    """

    path: str
    op: str
    m: MKind
    median_ns: float
    q1_ns: float
    q3_ns: float
    floor_ratio: float | None


class Result(TypedDict):
    """A whole run, as `--json` writes it. `skipped` names what could not run, a path or `path (m)`, and why."""

    machine: dict[str, Any]
    rows: list[PathTime]
    skipped: dict[str, str]


#: path, m
Cell = tuple[str, MKind]


@dataclass(frozen=True)
class Criterion:
    """At most (or at least) `limit`: the median of `cell` in ns, less `minus`'s or over `over`'s; or its floor_ratio."""

    text: str
    cell: Cell
    limit: float
    over: Cell | None = None
    minus: Cell | None = None
    floor: bool = False
    at_least: bool = False

    @property
    def is_ratio(self) -> bool:
        """Whether the figure is a ratio, not ns."""
        return self.floor or self.over is not None


#: Targets: those of the CPU for a machine like the one in benchmarks/results, the others for an H200.
TARGETS: tuple[Criterion, ...] = (
    Criterion("hdispatch.ops, null driver", ("null-driver", "fixed"), 150),
    Criterion("table probe, 10,000 rows", ("table-probe", "fixed"), 10),
    Criterion("config pick, 300 keys", ("config-pick", "cycling"), 150),
    Criterion("TVM-FFI row from C - bare call", ("tvm-ffi-row", "fixed"), 120, minus=("tvm-ffi-function", "fixed")),
    Criterion("TVM-FFI row, hdispatch.ops - bare call", ("tvm-ffi-ops", "fixed"), 120, minus=("tvm-ffi-function", "fixed")),
    Criterion("hdispatch.ops / bare cuLaunchKernelEx", ("hdispatch.ops", "fixed"), 1.00, floor=True),
    Criterion("the same without PDL / bare cuLaunchKernelEx", ("hdispatch.ops-nopdl", "fixed"), 1.25, floor=True),
    Criterion("torch.ops.hdispatch / bare cuLaunchKernelEx", ("torch.ops.hdispatch", "fixed"), 1.5, floor=True),
    Criterion("host function of CuteDSL's / bare cuLaunchKernelEx", ("host-function", "fixed"), 1.1, floor=True),
    Criterion("Helion called directly / hdispatch.ops", ("helion", "fixed"), 6, over=("hdispatch.ops", "fixed"), at_least=True),
    Criterion(
        "vLLM's torch.ops._C / hdispatch.ops", ("torch.ops._C", "fixed"), 2, over=("hdispatch.ops", "fixed"), at_least=True
    ),
    Criterion("hdispatch.ops, unseen M / fixed M", ("hdispatch.ops", "unseen"), 1.1, over=("hdispatch.ops", "fixed")),
    Criterion("360 eager launches, per kernel", ("chain-hdispatch", "fixed"), 3000),
    Criterion("load, scaled to 1,000 rows", ("load-bundle-1000-rows", "fixed"), 300e6),
)

Verdict = Literal["pass", "miss", "not run"]


@dataclass(frozen=True)
class Judged:
    """A target with what was measured: ns or a ratio; None if it did not run."""

    target: Criterion
    measured: float | None

    @property
    def verdict(self) -> Verdict:
        """Whether the target is met."""
        if self.measured is None:
            return "not run"
        met = self.measured >= self.target.limit if self.target.at_least else self.measured <= self.target.limit
        return "pass" if met else "miss"


def judge(rows: Sequence[PathTime], targets: Sequence[Criterion] = TARGETS) -> list[Judged]:
    """Every target beside what the rows say."""
    cells: dict[Cell, PathTime] = {(row["path"], row["m"]): row for row in rows}
    return [Judged(target, _measured(target, cells)) for target in targets]


def _measured(target: Criterion, cells: dict[Cell, PathTime]) -> float | None:
    row = cells.get(target.cell)
    if row is None:
        return None
    if target.floor:
        return row["floor_ratio"]
    if target.minus is not None:
        floor = cells.get(target.minus)
        return row["median_ns"] - floor["median_ns"] if floor else None
    if target.over is None:
        return row["median_ns"]
    over = cells.get(target.over)
    return row["median_ns"] / over["median_ns"] if over else None


def write_json(result: Result, file: Path) -> None:
    """Write a result."""
    write_text(json.dumps(result, indent=1) + "\n", file)


def write_text(text: str, file: Path) -> None:
    """Write a file; `HdispatchError` if it cannot be written."""
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise HdispatchError(f"cannot write {file}: {error.strerror}") from error
