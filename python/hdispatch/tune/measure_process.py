"""The process that measures, seen from the one that started it: cells in, timings out; ended when a candidate does not end.

A kernel that never ends cannot be stopped from the process that launched it, and a broken context cannot be mended: both cost
that process, and the next one continues with the other candidates. measure_worker.py has the protocol.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

from ..child import Child, WorkerGone, WorkerLate
from ..errors import HdispatchError
from .card import Card, alike, words
from .timings import Timing

#: What Python is started with. -P keeps the current folder off the module path.
COMMAND = ("-P", "-c", "from hdispatch.tune.measure_worker import main; main()")
#: Seconds for importing torch, reading the bundle and opening the GPU; and for a cell's arguments and its reference.
START_SECONDS, CELL_SECONDS = 600.0, 600.0


@dataclass(frozen=True)
class Setup:
    """Told to the process once: the bundle, the CUDA device's index, the seed, what goes into every line, and ops to define."""

    bundle: str
    device: int
    seed: int
    versions: dict[str, Any]
    kernels: list[str]


@dataclass(frozen=True)
class Lost:
    """A candidate that its process was lost with: its record's index, what became of it, why, and its seconds so far."""

    record: int
    status: Literal["fatal", "timeout"]
    why: str
    seconds: float


class WorkerLost(HdispatchError):
    """The worker is gone, and no candidate caused it: another worker can measure the cell."""


class MeasureProcess:
    """One such process after the other; `ready` before the first cell. `timeout`: seconds that a candidate's step may take."""

    def __init__(self, setup: Setup, timeout: float, command: Sequence[str] | None = None) -> None:
        """Start the first. `command`: the arguments of Python, COMMAND if None."""
        self.name = f"GPU {setup.device}"
        self.versions = setup.versions
        self.card: Card | None = None
        self._setup = setup
        self._timeout = timeout
        self._command = (sys.executable, *(COMMAND if command is None else command))
        self._child: Child | None = None
        self._start()

    def _start(self) -> None:
        self._child = Child(self._command)
        with contextlib.suppress(WorkerGone):  # it ended at once: `ready` says so
            self._child.send(asdict(self._setup))

    def ready(self) -> None:
        """Wait until it can measure, and know its card. `HdispatchError` if it cannot start, with what it said."""
        try:
            if self._child is None:
                raise WorkerLost(f"{self.name}: its process was ended")
            card = cast(Card, _unless_error(self._child.receive(START_SECONDS))["card"])
        except BaseException:
            self.close()
            raise
        if self.card is not None and not alike(card, self.card):
            raise HdispatchError(f"{self.name} has {words(card)}; it had {words(self.card)}: name another file of timings")
        self.card = card

    def measure(self, cell: int, skip: Collection[int]) -> list[Timing] | Lost:
        """The lines of a cell, by its index, without the records to skip; or that of the candidate that was the end of it.

        `WorkerLost` if the process is gone and no candidate is to blame, `HdispatchError` if it says what is wrong.
        """
        try:
            if self._child is None:
                self._start()
                self.ready()
            return self._measure(cast(Child, self._child), cell, skip)
        except (WorkerGone, WorkerLate) as error:
            raise WorkerLost(str(error)) from error

    def _measure(self, child: Child, cell: int, skip: Collection[int]) -> list[Timing] | Lost:
        child.send({"cell": cell, "skip": sorted(skip)})
        record: int | None = None
        since = time.monotonic()
        while True:
            try:
                message = _unless_error(child.receive(CELL_SECONDS if record is None else self._timeout))
            except (WorkerGone, WorkerLate) as error:
                if record is None:
                    raise
                seconds = time.monotonic() - since
                if isinstance(error, WorkerGone):
                    return Lost(record, "fatal", f"it took the process along: {error}", seconds)
                return Lost(record, "timeout", f"it had not ended after {self._timeout:g} s; its process was ended", seconds)
            if "found" in message:
                return cast("list[Timing]", message["found"])
            record, since = message["at"], time.monotonic()

    def close(self) -> None:
        """End the process; the next cell starts another."""
        child, self._child = self._child, None
        if child is not None:
            child.close()


def _unless_error(message: dict[str, Any]) -> dict[str, Any]:
    if "error" in message:
        raise HdispatchError(message["error"])
    return message
