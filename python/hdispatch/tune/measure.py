"""Measuring the candidates of a bundle, cell by cell, into a file of timings that a later run resumes.

The workers of a farm do so (farm.py), each in a separate process (measure_process.py): one that a candidate breaks or never
leaves is replaced. A cell is measured whole by one worker, and its lines are written when it is done, so that a worker that
is lost leaves nothing behind: another one measures its cell.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import _C, registry
from ..errors import HdispatchError
from . import timings
from .candidates import CandidateBundle, Cell, cell_key_of, check_ops, code_of, config_key_of, identity, read_candidates
from .card import Card, words
from .cell_bench import Bench, Outcome, line_of
from .device import Device
from .farm import Farm, LocalFarm, Started, Task, Worker
from .measure_process import Lost, WorkerLost
from .timings import BROKE, CellKey, ConfigKey, Timing, card_of

#: Losses in a row, without a cell in between, after which a worker is given up.
LOSSES = 2


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
    """The result of a run: cells done now, done before and left; seconds.

    failures  a line of text per candidate without a time
    notes     one per worker that was left out, lost or given up
    """

    measured: int = 0
    before: int = 0
    left: int = 0
    seconds: float = 0.0
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def measure(
    folder: Path,
    out: Path,
    options: Options | None = None,
    *,
    farm: Farm | None = None,
    device: Device | None = None,
    versions: Callable[[], dict[str, Any]] = dict,
    kernels: Sequence[str] = (),
    progress: Callable[[int, int, str], None] | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Report:
    """Measure the cells of a candidate bundle that `out` has not whole, and append what is found to `out`.

    farm      the GPUs to measure on; None: the current CUDA device
    device    to measure on in this very process instead, which a candidate may then take along
    versions  called where a worker runs; goes into every line
    kernels   folders and dotted packages of ops that are not installed, as `registry.define_package` takes them
    progress  called before each cell with candidates done, candidates in all and the cell's name
    say       called with a line of text about each worker when they have started

    A candidate that breaks its process or takes longer than the timeout is noted in `out` as fatal or timeout and is not tried
    again, here or in a later run; the rest is measured. The cell of a worker that is lost is measured again by another.
    Raises `BundleError` for a bundle that cannot be read or is for other ops than the installed ones, `HdispatchError` for one
    that is for another GPU, if `out` holds another card's timings or cannot be written, if every worker is lost, and for a
    failure that is not a candidate's.
    """
    chosen = options or Options()
    bundle = read_candidates(folder)
    for each in kernels:
        registry.define_package(each)
    check_ops(folder, bundle)
    whole: Farm = farm or LocalFarm()
    if device is not None:
        whole = _Here(bundle, device)
    with contextlib.closing(whole):
        started = whole.start(Task(folder, chosen.seed, chosen.timeout, versions, tuple(kernels)))
        known = _read_known(out)
        _keep_alike(started, out, known)
        for worker in started.workers:
            say(f"{worker.name}: {words(_card(worker))}, driver {worker.versions.get('driver') or 'unknown'}")
        if not out.exists():
            timings.append(out, [])  # whether it can be written shows now
        keyed = {(timings.cell_key(line), timings.config_key(line)): line for line in known}
        run = _Run(bundle, out, keyed, chosen, progress)
        run.report.notes += started.notes
        return run.go(started.workers)


class _Here:
    """A farm and its worker in this process: the end of it is the end of the run."""

    name = "this process"

    def __init__(self, bundle: CandidateBundle, device: Device) -> None:
        self.card: Card | None = device.card()
        self.versions: dict[str, Any] = {}
        self._bundle = bundle
        self._device = device
        self._culprit = ""

    def start(self, task: Task) -> Started:
        """Itself."""
        self.versions, self._seed = task.versions(), task.seed
        self._bench = Bench(self._bundle, self._device, random.Random(task.seed), self.versions)
        return Started([self])

    def measure(self, cell: int, skip: Collection[int]) -> list[Timing]:
        """Every line, or that of the candidate that broke the context."""
        if self._culprit:
            raise HdispatchError(
                f"a candidate broke the GPU context: {self._culprit}. It is noted; run again to continue without it"
            )
        found = self._bench.measure(self._bundle["candidates"]["cells"][cell], set(skip), self._seed)
        self._culprit = next((_failure(timing) for timing in found if timing["status"] in BROKE), "")
        return found

    def close(self) -> None:
        """Serve none of the candidates any more."""
        _C.withdraw(self._device.index)


class _Run:
    """Measures what a file of timings does not have yet, in a thread for each worker; `self.changed` guards what they share."""

    def __init__(
        self,
        bundle: CandidateBundle,
        out: Path,
        known: Mapping[tuple[CellKey, ConfigKey], Timing],
        chosen: Options,
        progress: Callable[[int, int, str], None] | None,
    ) -> None:
        self.bundle = bundle
        self.out = out
        self.known = known
        self.broke = {identity(line) for line in known.values() if line["status"] in BROKE}
        self.report = Report()
        self.changed = threading.Condition()
        self.progress = progress
        self.start = time.monotonic()
        self.end = None if chosen.seconds is None else self.start + chosen.seconds
        every = bundle["candidates"]["cells"]
        cells = [at for at, cell in enumerate(every) if chosen.ops is None or cell["op"] in chosen.ops]
        todo = [at for at in cells if not self._complete(every[at])]
        self.report.before, self.report.left = len(cells) - len(todo), len(todo)
        self.queue = deque(todo[: chosen.limit])
        self.under_way = self.serving = 0
        self.done, self.total = 0, sum(len(every[at]["records"]) for at in self.queue)
        #: The first error of a thread, after which no cell is begun.
        self.error: BaseException | None = None

    def go(self, workers: Sequence[Worker]) -> Report:
        """Cell by cell, until all are done or the time is up."""
        if len(workers) == 1:
            self._serve(workers[0])
        else:
            self._serve_all(workers)
        if self.error is not None:
            raise self.error
        if self.queue and not self._time_is_up():
            at = cell_key_of(self.bundle["candidates"]["cells"][self.queue[0]])
            raise HdispatchError(f"every worker was lost, {at} is not measured: {self.report.notes[-1]}; run again to go on")
        self.report.seconds = time.monotonic() - self.start
        return self.report

    def _serve_all(self, workers: Sequence[Worker]) -> None:
        """A thread for each worker; where one fails, or this one is interrupted, every worker is ended."""
        threads = [threading.Thread(target=self._serve, args=[worker], name=worker.name) for worker in workers]
        self.serving = len(threads)
        for thread in threads:
            thread.start()
        try:
            with self.changed:
                while self.error is None and self.serving:
                    self.changed.wait()
        except BaseException as error:
            self._fail(error)
        finally:
            if self.error is not None:
                for worker in workers:
                    worker.close()
            for thread in threads:
                thread.join()

    def _serve(self, worker: Worker) -> None:
        """Measure cells with a worker until there is none left for it."""
        lost = 0
        while lost < LOSSES and (at := self._next()) is not None:
            try:
                self._measure(worker, at)
            except WorkerLost as error:
                worker.close()
                lost += 1
                self._give_back(at, f"{worker.name} was lost, its cell is measured again: {error}")
            except BaseException as error:
                self._fail(error)
                self._give_back(at)
            else:
                lost = 0
                self._finish(at)
        with self.changed:
            self.serving -= 1
            self.changed.notify_all()

    def _next(self) -> int | None:
        """A cell to measure now; None if there is none. Waits while a cell may come back from a worker that is lost."""
        with self.changed:
            while self.error is None and not self._time_is_up():
                if self.queue:
                    at = self.queue.popleft()
                    self.under_way += 1
                    if self.progress:
                        self.progress(self.done, self.total, str(cell_key_of(self.bundle["candidates"]["cells"][at])))
                    return at
                if not self.under_way:
                    return None
                self.changed.wait()
            return None

    def _time_is_up(self) -> bool:
        return self.end is not None and time.monotonic() >= self.end

    def _finish(self, at: int) -> None:
        with self.changed:
            self.under_way -= 1
            self.done += len(self.bundle["candidates"]["cells"][at]["records"])
            self.report.measured, self.report.left = self.report.measured + 1, self.report.left - 1
            self.changed.notify_all()

    def _give_back(self, at: int, note: str = "") -> None:
        with self.changed:
            self.under_way -= 1
            self.queue.appendleft(at)
            if note and self.error is None:
                self.report.notes.append(note)
            self.changed.notify_all()

    def _fail(self, error: BaseException) -> None:
        with self.changed:
            self.error = self.error or error
            self.changed.notify_all()

    def _measure(self, worker: Worker, at: int) -> None:
        """A cell; again without it where a candidate was the end of what measured."""
        cell = self.bundle["candidates"]["cells"][at]
        while (skip := self._broken(cell)) < set(cell["records"]):
            found = worker.measure(at, skip)
            if isinstance(found, Lost):
                found = [self._lost(worker, cell, found)]
            broke = {identity(timing) for timing in found if timing["status"] in BROKE}
            with self.changed:
                timings.append(self.out, found)
                self.report.failures += [_failure(timing) for timing in found if timing["status"] != "ok"]
                self.broke |= broke
            if not broke:
                return
            worker.close()

    def _lost(self, worker: Worker, cell: Cell, lost: Lost) -> Timing:
        outcome = Outcome(lost.status, lost.why)
        return line_of(self.bundle, cell, lost.record, outcome, lost.seconds, _card(worker), worker.versions)

    def _broken(self, cell: Cell) -> set[int]:
        """The records of a cell that were the end of a process, here or elsewhere."""
        with self.changed:
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


def _card(worker: Worker) -> Card:
    """The card of a worker that has started."""
    return worker.card or {"name": "unknown"}


def _read_known(out: Path) -> list[Timing]:
    """The lines of a file of timings; none if there is no such file. `HdispatchError` if they are of unlike cards."""
    lines = timings.read(out) if out.exists() else []
    if cards := timings.unlike_cards(lines):
        raise HdispatchError(f"{out} holds timings of unlike cards, {' and '.join(cards)}: name another file")
    return lines


def _keep_alike(started: Started, out: Path, known: Sequence[Timing]) -> None:
    """Keep the workers whose card is that of the file's lines, or else that of most. `HdispatchError` if there is none."""
    cards = [card_of(line) for line in known]
    others = started.keep_alike(max(cards, key=len, default=None))
    if not started.workers:
        raise HdispatchError(f"{out} holds timings of {words(max(cards, key=len))!r}; this is {others!r}: name another file")


def _failure(timing: Timing) -> str:
    config = timings.config_key(timing).config
    return f"{timings.cell_key(timing)}: {timing['backend']} {config} is {timing['status']}: {timing['why']}"
