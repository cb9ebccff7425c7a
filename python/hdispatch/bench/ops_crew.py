"""The processes that compile for the op benchmark: all compile at once, and then one at a time measures.

A crew does two things with a list of cells. `compile_cells` hands them out, next cell to the next process that is free,
until they are done or a deadline has passed. `time_cells` then asks for one cell after the other, so that nothing else
runs on the GPU meanwhile.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ..child import Child, WorkerGone
from .ops_grid import Cell
from .ops_worker import Setup

#: -P keeps the current folder off the module path.
_COMMAND = (sys.executable, "-P", "-c", "from hdispatch.bench.ops_worker import main; main()")
#: Seconds past the deadline that a cell under way may take; then its process is ended.
GRACE = 45.0


class Asked(Protocol):
    """What takes one request at a time and answers it."""

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The answer; `WorkerGone` if there is none to come."""

    def kill(self) -> None:
        """End it; a request under way gets no answer."""


@dataclass
class Compiled:
    """What came of compiling: who holds which cell, seconds by cell, and reasons of those that failed."""

    held: list[tuple[Cell, Asked]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    failed: list[tuple[Cell, str]] = field(default_factory=list)
    lost: int = 0


def compile_cells(
    workers: Sequence[Asked],
    cells: Sequence[Cell],
    deadline: float,
    tick: Callable[[], None] = lambda: None,
    grace: float = GRACE,
    clock: Callable[[], float] = time.monotonic,
) -> Compiled:
    """Compile cells in order until `deadline` (of `clock`); `tick` is called after each.

    A process that has not answered `grace` seconds later is ended, and what it holds is lost with it, as with one that ends
    by itself.
    """
    waiting: queue.SimpleQueue[Cell] = queue.SimpleQueue()
    for cell in cells:
        waiting.put(cell)
    shares = [_Share(worker) for worker in workers]
    threads = [threading.Thread(target=_work, args=(share, waiting, deadline, tick, clock), daemon=True) for share in shares]
    for thread in threads:
        thread.start()
    for share, thread in zip(shares, threads, strict=True):
        while thread.is_alive() and clock() < deadline + grace:
            thread.join(0.2)
        if thread.is_alive():
            share.worker.kill()
            thread.join()
    result = Compiled(lost=sum(len(share.held) for share in shares if share.gone))
    for share in shares:
        result.seconds += share.seconds
        result.failed += share.failed
        if not share.gone:
            result.held += [(cell, share.worker) for cell in share.held]
    order = {json.dumps(cell): at for at, cell in enumerate(cells)}
    result.held.sort(key=lambda each: order[json.dumps(each[0])])
    return result


@dataclass
class _Share:
    """What one process has done."""

    worker: Asked
    held: list[Cell] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    failed: list[tuple[Cell, str]] = field(default_factory=list)
    gone: bool = False


def _work(
    share: _Share, waiting: queue.SimpleQueue[Cell], deadline: float, tick: Callable[[], None], clock: Callable[[], float]
) -> None:
    while clock() < deadline:
        try:
            cell = waiting.get_nowait()
        except queue.Empty:
            return
        try:
            answer = share.worker.ask({"do": "compile", "cell": cell})
        except WorkerGone as error:
            share.gone = True
            share.failed.append((cell, str(error)))
            return
        if "error" in answer:
            share.failed.append((cell, answer["error"]))
        else:
            share.held.append(cell)
            share.seconds.append(answer["seconds"])
        tick()


def time_cells(held: Sequence[tuple[Cell, Asked]], go_on: Callable[[], bool]) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """Each cell with its process's answer, one at a time, as long as `go_on`; one that fails answers {"error": reason}."""
    for cell, worker in held:
        if not go_on():
            return
        try:
            yield cell, worker.ask({"do": "time", "cell": cell})
        except WorkerGone as error:
            yield cell, {"error": str(error)}


def add_stats(total: dict[str, dict[str, Any]], more: Mapping[str, Mapping[str, Any]]) -> None:
    """Add one process's `stats()` to another's."""
    for op, counts in more.items():
        sums = total.setdefault(op, {"hits": 0, "empty": 0, "fallbacks": 0, "misses": {}})
        for name in ("hits", "empty", "fallbacks"):
            sums[name] += counts[name]
        for reason, count in counts["misses"].items():
            sums["misses"][reason] = sums["misses"].get(reason, 0) + count


def stats_of(workers: Sequence[Asked]) -> Iterator[dict[str, dict[str, Any]]]:
    """`stats()` of each process that still answers."""
    for worker in workers:
        with contextlib.suppress(WorkerGone):
            yield worker.ask({"do": "stats"}).get("stats", {})


# ---- processes ----


class Process:
    """A process of `ops_worker`."""

    def __init__(self, setup: Setup, environment: Mapping[str, str]) -> None:
        self._child = Child(_COMMAND, environment)
        self._setup: Setup | None = setup

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a request. The first one waits until the process has started; if it could not, that is the answer."""
        if self._setup is not None:
            started = self._exchange(asdict(self._setup))
            self._setup = None
            if "error" in started:
                self.kill()
                raise WorkerGone(f"a worker process could not start: {started['error']}")
        return self._exchange(request)

    def _exchange(self, message: Mapping[str, Any]) -> dict[str, Any]:
        self._child.send(message)
        return self._child.receive()

    def kill(self) -> None:
        """End the process."""
        self._child.kill()

    def close(self) -> None:
        """End the process and close its pipes."""
        self._child.close()


@contextmanager
def crew(count: int, bundle: Path, vllm_ops: Path | None, rounds: int, seed: int) -> Iterator[list[Process]]:
    """`count` processes, which are gone at the end of the block. What they compile goes to a folder that goes too."""
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hdispatch-ops-", ignore_cleanup_errors=True)))
        library = str(vllm_ops.resolve()) if vllm_ops else None
        setups = [Setup(str(bundle.resolve()), library, rounds, seed + at, str(scratch / "lock")) for at in range(count)]
        processes = []
        for setup in setups:
            processes.append(Process(setup, environment(scratch)))
            stack.callback(processes[-1].close)
        yield processes


def environment(scratch: Path) -> dict[str, str]:
    """The caller's environment, with caches of its own, and one compiling thread per process."""
    return os.environ | {
        "OMP_NUM_THREADS": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor"),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "TRITON_CACHE_DIR": str(scratch / "triton"),
    }
