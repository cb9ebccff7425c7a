"""Compiling candidates: as a build does, but a unit that fails, hangs or kills its worker is reported and left out."""

from __future__ import annotations

import queue
import sys
import tempfile
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..compile import builder, op_package, pool
from ..compile.build_unit import Built, RefusedEntry, Unit
from ..compile.pool import _Worker
from ..compile.store import Store
from ..compile.target import GpuTarget
from ..compile.versions import tool_versions
from ..compile.worker import Setup
from ..errors import BuildError

#: A compilation that takes longer has gone wrong.
COMPILE_SECONDS = 600.0


@dataclass
class Made:
    """What came of a unit: its records as `record.build_records` gives them, or the problem; whether the cache had it."""

    built: list[Built] = field(default_factory=list)
    problem: str = ""
    cached: bool = False
    tools: dict[str, str] = field(default_factory=dict)


class Attempts:
    """Compiles units for a target, with results in a store: those of earlier builds, and those that failed, are found there."""

    def __init__(self, target: GpuTarget, store: Store, jobs: int | None) -> None:
        if jobs is not None and jobs < 1:
            raise BuildError(f"jobs is {jobs}; it takes at least 1 worker process")
        self.target = target
        self.store = store
        self.jobs = jobs or pool.available_cpus()

    def run(
        self, units: Sequence[Unit], own: Sequence[Collection[int]], progress: Callable[[int, int, str], None] | None
    ) -> list[Made]:
        """What came of each unit. One that cannot serve all of its buckets is made for its `own` ones."""
        tools = {backend: tool_versions(backend, self.target) for backend in {unit.backend for unit in units}}
        sources = op_package.sources({unit.package for unit in units})

        def key(unit: Unit) -> str:
            return builder.record_key(unit, sources[unit.package], self.target, tools[unit.backend])

        made: list[Made] = [Made() for _ in units]
        done = 0
        with tempfile.TemporaryDirectory(prefix="hdispatch-tune-") as scratch:
            workers = _Workers(self.target, self.store.root, Path(scratch))
            threads = ThreadPoolExecutor(self.jobs)
            try:
                futures = {
                    threads.submit(self._make, workers, _tries(unit, mine), key, tools[unit.backend]): index
                    for index, (unit, mine) in enumerate(zip(units, own, strict=True))
                }
                for future in as_completed(futures):
                    made[futures[future]] = future.result()
                    done += 1
                    if progress:
                        progress(done, len(units), units[futures[future]].label)
            finally:
                threads.shutdown(wait=False, cancel_futures=True)
                workers.kill()
                threads.shutdown(wait=True)
                workers.close()
        return made

    def _make(self, workers: _Workers, tries: Sequence[Unit], key: Callable[[Unit], str], tools: Mapping[str, str]) -> Made:
        problem = ""
        for unit in tries:
            found = builder.find_built(unit, key(unit), self.store)
            if found is not None:
                return Made(found, cached=True, tools=dict(tools))
            if (refused := self.store.get("refused", key(unit), RefusedEntry)) is None:
                try:
                    built = workers.build(unit, tools)
                except WorkerLost as error:  # of memory or time: another run may have more
                    return Made(problem=str(error), tools=dict(tools))
                except BuildError as error:
                    refused = {"problem": str(error)}
                    self.store.put("refused", key(unit), refused)
                else:
                    self.store.put("record", key(unit), {"built": built})
                    return Made(built, tools=dict(tools))
            problem = problem or refused["problem"]
        return Made(problem=problem, tools=dict(tools))


def _tries(unit: Unit, own: Collection[int]) -> list[Unit]:
    """The unit; and, if some of its buckets are merely tried, the unit without them."""
    mine = tuple(sorted(own))
    return [unit] if mine == unit.buckets or not mine else [unit, replace(unit, buckets=mine)]


class _Workers:
    """Worker processes, started as they are needed; one that dies or takes too long is replaced."""

    def __init__(self, target: GpuTarget, store: Path, scratch: Path) -> None:
        self.setup = Setup(target.to_json(), str(store), [path for path in sys.path if path])
        self.environment = pool.environment(scratch, target)
        self.idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self.all: list[_Worker] = []
        self.lock = threading.Lock()
        self.ended = False

    def build(self, unit: Unit, tools: Mapping[str, str]) -> list[Built]:
        """The records of a unit. BuildError if it has none; WorkerLost if its process ended or took too long."""
        worker = self._take()
        timer = threading.Timer(COMPILE_SECONDS, worker.process.kill)
        timer.start()
        try:
            return worker.build(unit, tools)
        except BuildError as error:
            if worker.process.poll() is not None:
                raise WorkerLost(str(error)) from error
            raise
        finally:
            timer.cancel()
            timer.join()
            if worker.process.poll() is None:
                self.idle.put(worker)

    def _take(self) -> _Worker:
        with self.lock:
            if self.ended:
                raise WorkerLost("broken off")
            try:
                return self.idle.get_nowait()
            except queue.Empty:
                worker = _Worker(self.setup, self.environment)
                self.all.append(worker)
                return worker

    def kill(self) -> None:
        """Ends every process; what they work on is lost, and no other begins."""
        with self.lock:
            self.ended = True
            for worker in self.all:
                worker.kill()

    def close(self) -> None:
        """Closes the pipes of processes that are gone, once no thread uses them."""
        for worker in self.all:
            worker.close()


class WorkerLost(BuildError):
    """A worker process is gone: killed for its memory, for taking too long, or with the whole run."""
