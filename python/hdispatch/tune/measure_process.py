"""The process that measures, seen from the one that started it: cells in, timings out; ended when a candidate does not end.

A kernel that never ends cannot be stopped from the process that launched it, and a broken context cannot be mended: both cost
that process, and the next one continues with the other candidates. measure_worker.py has the protocol.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

from ..child import Child, WorkerGone, WorkerLate
from ..errors import HdispatchError
from .timings import Timing

#: -P keeps the current folder off the module path.
COMMAND = (sys.executable, "-P", "-c", "from hdispatch.tune.measure_worker import main; main()")
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


class MeasureProcess:
    """One such process after the other. `timeout`: seconds that a candidate may take for one step."""

    def __init__(self, setup: Setup, timeout: float) -> None:
        """Start the first. `HdispatchError` if it cannot start, with what it said."""
        self._setup = setup
        self._timeout = timeout
        self._child: Child | None = None
        self.gpu = self._start()

    def _start(self) -> str:
        self._child = Child(COMMAND)
        try:
            self._child.send(asdict(self._setup))
            return str(_unless_error(self._child.receive(START_SECONDS))["gpu"])
        except BaseException:
            self.close()
            raise

    def measure(self, cell: int, skip: Collection[int]) -> list[Timing] | Lost:
        """The lines of a cell, by its index, without the records to skip. `HdispatchError` if no candidate is to blame."""
        if self._child is None:
            self._start()
        child = cast(Child, self._child)
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
        if self._child is not None:
            self._child.close()
        self._child = None


def _unless_error(message: dict[str, Any]) -> dict[str, Any]:
    if "error" in message:
        raise HdispatchError(message["error"])
    return message
