"""Measuring the candidates of a bundle, cell by cell, into a file of timings that a later run resumes.

`measure` does so in a separate process (measure_process.py): one that a candidate breaks or never leaves is replaced.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from .. import _C, registry
from ..errors import HdispatchError
from ..manifest import MANIFEST_NAME
from . import timings
from .candidates import CandidateBundle, Cell, cell_key_of, code_of, config_key_of, read_candidates
from .cell_bench import Bench, Outcome, line_of
from .device import Device
from .measure_process import Lost, MeasureProcess, Setup
from .timings import BROKE, CellKey, ConfigKey, Timing


@dataclass(frozen=True)
class Options:
    """The part of a bundle to measure, and for how long. None: all of it.

    ops      names of ops
    limit    cells
    seconds  after which no further cell is begun
    seed     of the arguments and of the order
    timeout  seconds that a candidate may take for one step: to be loaded, checked and captured, or for one figure
    """

    ops: Sequence[str] | None = None
    limit: int | None = None
    seconds: float | None = None
    seed: int = 0
    timeout: float = 60.0

    def __post_init__(self) -> None:
        """`HdispatchError` for a number that says nothing."""
        if self.limit is not None and self.limit < 0:
            raise HdispatchError(f"the limit is {self.limit} cells; it takes 0 or more")
        if self.seconds is not None and not self.seconds >= 0:
            raise HdispatchError(f"the time is {self.seconds} s; it takes 0 or more")
        if not 0 < self.timeout < 1e6:
            raise HdispatchError(f"the timeout is {self.timeout} s; it takes more than 0, and less than 1e6")


@dataclass
class Report:
    """The result of a run: cells done now, done before and left; seconds; a line of text per candidate without a time."""

    measured: int = 0
    before: int = 0
    left: int = 0
    seconds: float = 0.0
    failures: list[str] = field(default_factory=list)


def measure(
    folder: Path,
    out: Path,
    options: Options | None = None,
    *,
    device: Device | None = None,
    versions: Mapping[str, Any] | None = None,
    kernels: Sequence[str] = (),
    progress: Callable[[int, int, str], None] | None = None,
) -> Report:
    """Measure the cells of a candidate bundle that `out` has not whole, and append what is found to `out`.

    device    to measure on in this very process, which a candidate may then take along; None: the current CUDA device, from
              processes that are ended where a candidate breaks them or takes longer than the timeout
    versions  goes into every line
    kernels   folders and dotted packages of ops that are not installed, as `registry.define_package` takes them
    progress  called before each cell with candidates done, candidates in all and the cell's name

    Such a candidate is noted in `out` as fatal or timeout and is not tried again, here or in a later run; the rest goes on.
    Raises `BundleError` for a bundle that cannot be read or is for other ops than the installed ones, `HdispatchError` for one
    that is for another GPU, if `out` holds another GPU's timings or cannot be written, and if what is no candidate's fails.
    """
    chosen = options or Options()
    bundle = read_candidates(folder)
    for each in kernels:
        registry.define_package(each)
    _check_ops(folder, bundle)
    given = dict(versions or {})
    measurer: _Measurer
    if device is not None:
        measurer = _Here(bundle, device, chosen.seed, given)
    else:
        setup = Setup(str(folder.resolve()), _current_device(), chosen.seed, given, list(kernels))
        measurer = MeasureProcess(setup, chosen.timeout)
    with contextlib.closing(measurer):
        return _Run(bundle, out, measurer, given, _read_known(out, measurer.gpu)).go(chosen, progress)


class _Measurer(Protocol):
    """Measures one cell at a time."""

    gpu: str

    def measure(self, cell: int, skip: Collection[int]) -> list[Timing] | Lost:
        """The lines of a cell, by its index, without the records to skip; or that of the candidate that was the end of it."""

    def close(self) -> None:
        """Give up what measured last; where another can be had, the next cell gets it."""


class _Here:
    """In this process: the end of it is the end of the run."""

    def __init__(self, bundle: CandidateBundle, device: Device, seed: int, versions: dict[str, Any]) -> None:
        self.gpu = device.describe()
        self._cells = bundle["candidates"]["cells"]
        self._bench = Bench(bundle, device, random.Random(seed), versions)
        self._seed = seed
        self._culprit = ""

    def measure(self, cell: int, skip: Collection[int]) -> list[Timing]:
        """Every line, or that of the candidate that broke the context."""
        if self._culprit:
            raise HdispatchError(
                f"a candidate broke the GPU context: {self._culprit}. It is noted; run again to continue without it"
            )
        found = self._bench.measure(self._cells[cell], set(skip), self._seed)
        self._culprit = next((_failure(timing) for timing in found if timing["status"] in BROKE), "")
        return found

    def close(self) -> None:
        """Serve none of the candidates any more."""
        _C.withdraw(self._bench.device.index)


class _Run:
    """Measures what a file of timings does not have yet."""

    def __init__(
        self,
        bundle: CandidateBundle,
        out: Path,
        measurer: _Measurer,
        versions: dict[str, Any],
        known: Mapping[tuple[CellKey, ConfigKey], Timing],
    ) -> None:
        self.bundle = bundle
        self.out = out
        self.measurer = measurer
        self.versions = versions
        self.known = known
        self.broke = {_identity(line) for line in known.values() if line["status"] in BROKE}
        self.report = Report()

    def go(self, chosen: Options, progress: Callable[[int, int, str], None] | None) -> Report:
        """Cell by cell, as far as the options say."""
        start = time.monotonic()
        report, every = self.report, self.bundle["candidates"]["cells"]
        cells = [at for at, cell in enumerate(every) if chosen.ops is None or cell["op"] in chosen.ops]
        todo = [at for at in cells if not self._complete(every[at])]
        report.before, report.left = len(cells) - len(todo), len(todo)
        done, total = 0, sum(len(every[at]["records"]) for at in todo[: chosen.limit])
        for at in todo[: chosen.limit]:
            if chosen.seconds is not None and time.monotonic() - start >= chosen.seconds:
                break
            if progress:
                progress(done, total, str(cell_key_of(every[at])))
            self._measure(at)
            report.measured, report.left = report.measured + 1, report.left - 1
            done += len(every[at]["records"])
        report.seconds = time.monotonic() - start
        return report

    def _measure(self, at: int) -> None:
        """A cell; again without it where a candidate was the end of what measured."""
        cell = self.bundle["candidates"]["cells"][at]
        while (skip := self._broken(cell)) < set(cell["records"]):
            found = self.measurer.measure(at, skip)
            if isinstance(found, Lost):
                found = [self._lost(cell, found)]
            timings.append(self.out, found)
            self.report.failures += [_failure(timing) for timing in found if timing["status"] != "ok"]
            broke = {_identity(timing) for timing in found if timing["status"] in BROKE}
            if not broke:
                return
            self.broke |= broke
            self.measurer.close()

    def _lost(self, cell: Cell, lost: Lost) -> Timing:
        outcome = Outcome(lost.status, lost.why)
        return line_of(self.bundle, cell, lost.record, outcome, lost.seconds, self.measurer.gpu, self.versions)

    def _broken(self, cell: Cell) -> set[int]:
        """The records of a cell that were the end of a process, here or elsewhere."""
        return {index for index in cell["records"] if self._key(cell, index) in self.broke}

    def _key(self, cell: Cell, index: int) -> tuple[str, ConfigKey, tuple[str, ...]]:
        record = self.bundle["manifest"]["records"][index]
        return cell["op"], config_key_of(record), tuple(code_of(self.bundle["manifest"], record))

    def _complete(self, cell: Cell) -> bool:
        """Whether every candidate of a cell has a line for its present code, or has broken a process."""
        return all(self._has(cell, index) for index in set(cell["records"]) - self._broken(cell))

    def _has(self, cell: Cell, index: int) -> bool:
        record = self.bundle["manifest"]["records"][index]
        line = self.known.get((cell_key_of(cell), config_key_of(record)))
        return line is not None and line["artifacts"] == code_of(self.bundle["manifest"], record)


def _identity(timing: Timing) -> tuple[str, ConfigKey, tuple[str, ...]]:
    """Identifies a candidate wherever it competes: its op, config and code."""
    return timing["op"], timings.config_key(timing), tuple(timing["artifacts"])


def _check_ops(folder: Path, bundle: CandidateBundle) -> None:
    """Refuse a bundle whose ops are not the installed ones."""
    for name, entry in bundle["manifest"]["ops"].items():
        registry.spec(name).check_same(entry, folder / MANIFEST_NAME, "make the candidates again")


def _current_device() -> int:
    if not torch.cuda.is_available():
        raise HdispatchError(
            f"candidates are measured on a GPU, and there is none here ({_C.driver_missing() or 'torch sees none'}); "
            "take the candidate bundle to one"
        )
    return torch.cuda.current_device() if torch.cuda.is_initialized() else 0  # type: ignore[no-untyped-call]


def _read_known(out: Path, gpu: str) -> dict[tuple[CellKey, ConfigKey], Timing]:
    if not out.exists():
        timings.append(out, [])  # whether it can be written shows now
        return {}
    lines = timings.read(out)
    if other := next((line["gpu"] for line in lines if line["gpu"] != gpu), None):
        raise HdispatchError(f"{out} holds timings of {other!r}; this is {gpu!r}: name another file")
    return {(timings.cell_key(line), timings.config_key(line)): line for line in lines}


def _failure(timing: Timing) -> str:
    config = timings.config_key(timing).config
    return f"{timings.cell_key(timing)}: {timing['backend']} {config} is {timing['status']}: {timing['why']}"
