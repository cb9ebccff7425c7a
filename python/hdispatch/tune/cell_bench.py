"""Measures the candidates of a cell in this process: each against the reference first, then against each other.

A launch table has one row per key, so each candidate gets a table of its own: one row, one class of M, published while the
candidate is called or captured. Tables are never unloaded, so a captured graph keeps its code when the next is published.
"""

from __future__ import annotations

import contextlib
import datetime
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NotRequired, TypedDict, get_args

import torch

from .. import registry
from ..errors import BundleError
from ..manifest import artifacts_of, class_of, ladders_of
from ..runtime import strict
from ..testing.device_timer import interleave
from ..testing.numeric import MismatchError
from .candidates import CandidateBundle, Cell, code_of
from .card import Card
from .cell_arguments import CellArguments
from .device import Device, OneRow, Timeable
from .timings import Status, Timing

#: Rounds in which every candidate is timed once, and after how many of them those slower than the best by which factor go.
ROUNDS = 9
EARLY_STOP = {2: 1.25, 4: 1.12}
#: Candidates further behind than this, by a first estimate, are not timed in a graph at all.
HOPELESS = 3.0
#: Intended time of one replay in µs, and its smallest and largest number of launches.
REPLAY_US, LEAST_LAUNCHES, MOST_LAUNCHES = 500.0, 4, 256
#: The same of launches that are made one by one. Were long ones as many as short ones, they would be most of what tuning takes.
QUEUED_US, MOST_QUEUED = 2000.0, 64
#: An estimate of no more µs may be the host's: the launch takes less.
HOST_US = 8.0
#: Calls that L2 holds are also timed on the same buffers: what the last op wrote is there. Not those with more bytes of
#: weights than an eighth of L2: other layers' have taken their place by the time that the op comes again.
WARM_BYTES, WARM_WEIGHTS = 48 * 2**20, 6 * 2**20
#: Replays in a row of those: under PDL kernels that release their successors at once pile up on some SMs, which shows after
#: some hundred launches and costs up to 20 %.
WARM_REPLAYS = 4
#: How launches are timed: in a graph whose buffers rotate, one by one in a stream, and in a graph on the same buffers.
How = Literal["graph", "stream", "warm"]


@dataclass
class Outcome:
    """The result of one candidate of a cell."""

    status: Status = "ok"
    why: str = ""
    estimate: float | None = None
    runs: dict[How, Timeable] = field(default_factory=dict)
    times: dict[How, list[float]] = field(default_factory=dict)


class Bench:
    """Measures cells in this process, one at a time. `announce` is told a candidate's record before each of its steps."""

    def __init__(
        self,
        bundle: CandidateBundle,
        device: Device,
        order: random.Random,
        versions: dict[str, Any],
        announce: Callable[[int], None] = lambda _: None,
    ) -> None:
        self.bundle = bundle
        self.device = device
        self.card = device.card()
        self.order = order
        self.versions = versions
        self.announce = announce

    def measure(self, cell: Cell, skip: set[int], seed: int) -> list[Timing]:
        """A line for each candidate that is not skipped. If one breaks the context, its line alone: no other was measured."""
        start = time.monotonic()
        outcomes = {index: Outcome() for index in cell["records"] if index not in skip}
        with strict(), contextlib.ExitStack() as stack:
            subject = CellArguments(cell, self.device, seed)
            for index, outcome in outcomes.items():
                self.announce(index)
                self._prepare(cell, index, subject, outcome, _best(outcomes))
                for timeable in outcome.runs.values():
                    stack.callback(timeable.close)
                if outcome.status == "fatal":
                    break
            else:
                self._time(outcomes)
            broken = {index: outcome for index, outcome in outcomes.items() if outcome.status == "fatal"}
            if broken:
                outcomes = broken
                stack.pop_all()  # nothing can be freed in a broken context
        seconds = (time.monotonic() - start) / max(len(outcomes), 1)
        return [
            line_of(self.bundle, cell, index, outcome, seconds, self.card, self.versions) for index, outcome in outcomes.items()
        ]

    def _prepare(self, cell: Cell, index: int, subject: CellArguments, outcome: Outcome, best: float) -> None:
        """Check a candidate; if it is right and not hopelessly behind, capture it."""
        try:
            serve = self.device.publish(self._row(cell, index))
            subject.check()
            calls = subject.calls()
            outcome.estimate = self.device.estimate(calls)
            if outcome.estimate <= HOPELESS * best:
                launches = subject.even(launch_count(outcome.estimate))
                outcome.runs["graph"] = self.device.replay(calls, launches)
                outcome.runs["stream"] = self.device.queued(serve, calls, subject.even(queued_count(outcome.estimate)))
                if subject.bytes <= WARM_BYTES and subject.weight_bytes <= WARM_WEIGHTS:
                    outcome.runs["warm"] = self.device.replay(calls[: subject.kinds], launches)
        except MismatchError as error:
            outcome.status, outcome.why = "wrong", str(error)
        except torch.OutOfMemoryError:  # says nothing about the candidate
            raise
        except RuntimeError as error:  # ours, the driver's, torch's: this candidate is out, the others are not
            outcome.status, outcome.why = "refused", str(error)
            try:
                self.device.synchronize()
            except RuntimeError:
                outcome.status = "fatal"

    def _row(self, cell: Cell, index: int) -> OneRow:
        manifest = self.bundle["manifest"]
        record = manifest["records"][index]
        if record["launcher"] == "cubin":
            only = class_of(cell["M"])
            if only not in record["cubins"]:
                raise BundleError(f"record {index} has no code for M = {cell['M']}; make the candidates again")
            record = {**record, "cubins": {only: record["cubins"][only]}}
        return OneRow(
            op=registry.get(cell["op"]),
            ladders=ladders_of(manifest["ops"][cell["op"]]),
            variant=cell["variant"],
            k=cell["K"],
            n=cell["N"],
            bucket=cell["bucket"],
            record=record,
            files={name: self.bundle["contents"][name] for name in artifacts_of(record)},
        )

    def _time(self, outcomes: Mapping[int, Outcome]) -> None:
        """In graphs; those that are not far behind there in the other ways too. Ends with one that breaks the context."""
        try:
            self._time_all(outcomes)
        except _BrokenError as error:
            outcomes[error.index].status, outcomes[error.index].why = "fatal", f"while it was timed: {error}"

    def _time_all(self, outcomes: Mapping[int, Outcome]) -> None:
        for how in get_args(How):
            running = {
                str(index): _Announced(outcome.runs[how], index, self.announce)
                for index, outcome in outcomes.items()
                if how in outcome.runs and (how == "graph" or len(outcome.times["graph"]) == ROUNDS)
            }
            in_a_row = WARM_REPLAYS if how == "warm" else 1
            for name, times in interleave(running, ROUNDS, self.order, EARLY_STOP, in_a_row).items():
                outcomes[int(name)].times[how] = times


class _BrokenError(Exception):
    """A candidate's launches failed while they were timed: what is measured next in this process says nothing."""

    def __init__(self, index: int, error: RuntimeError) -> None:
        super().__init__(str(error))
        self.index = index


@dataclass(frozen=True)
class _Announced:
    """Launches that name their candidate before they are made, and if they fail."""

    inner: Timeable
    index: int
    announce: Callable[[int], None]

    def time(self, replays: int = 1) -> float:
        """Microseconds per launch."""
        self.announce(self.index)
        try:
            return self.inner.time(replays)
        except torch.OutOfMemoryError:  # says nothing about the candidate
            raise
        except RuntimeError as error:
            raise _BrokenError(self.index, error) from error


def line_of(
    bundle: CandidateBundle, cell: Cell, index: int, outcome: Outcome, seconds: float, card: Card, versions: Mapping[str, Any]
) -> Timing:
    """The line of a candidate, by its record's index, in a cell."""
    record = bundle["manifest"]["records"][index]
    origin = bundle["candidates"]["origins"][index]
    second: _Second = {"second": cell["second"]} if "second" in cell else {}
    return {
        "op": cell["op"],
        "variant": cell["variant"],
        "K": cell["K"],
        "N": cell["N"],
        "bucket": cell["bucket"],
        "M": cell["M"],
        **second,
        "backend": record["backend"],
        "config": record["config"],
        "generic": origin["generic"],
        "artifacts": code_of(bundle["manifest"], record),
        "status": outcome.status,
        "why": outcome.why,
        **_times(outcome),
        "rounds": len(outcome.times.get("graph", ())),
        "compile_seconds": origin["seconds"],
        "device_seconds": round(seconds, 4),
        "gpu": card["name"],
        "card": card,
        "versions": {**versions, "tools": bundle["manifest"]["tools"]},
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


class _Second(TypedDict):
    second: NotRequired[int]


class _Times(TypedDict):
    us: NotRequired[float]
    q1: NotRequired[float]
    q3: NotRequired[float]
    stream_us: NotRequired[float]
    warm_us: NotRequired[float]


def _times(outcome: Outcome) -> _Times:
    """The figures of an outcome, as a line has them."""
    if outcome.status != "ok" or outcome.estimate is None:
        return {}
    if not outcome.times:
        return {"us": round(outcome.estimate, 4)}
    q1, us, q3 = statistics.quantiles(outcome.times["graph"], n=4, method="inclusive")
    found: _Times = {"us": round(us, 4), "q1": round(q1, 4), "q3": round(q3, 4)}
    if "stream" in outcome.times:
        found["stream_us"] = round(statistics.median(outcome.times["stream"]), 4)
    if "warm" in outcome.times:
        found["warm_us"] = round(statistics.median(outcome.times["warm"]), 4)
    return found


def _best(outcomes: Mapping[int, Outcome]) -> float:
    return min((outcome.estimate for outcome in outcomes.values() if outcome.estimate is not None), default=float("inf"))


def launch_count(estimate: float) -> int:
    """Launches of a replay, by the estimate of one; the most where that may be the host's time."""
    if estimate <= HOST_US:
        return MOST_LAUNCHES
    return max(LEAST_LAUNCHES, min(round(REPLAY_US / estimate), MOST_LAUNCHES))


def queued_count(estimate: float) -> int:
    """Launches that are made one by one, by the estimate of one."""
    return max(LEAST_LAUNCHES, min(round(QUEUED_US / max(estimate, 1.0)), MOST_QUEUED))
