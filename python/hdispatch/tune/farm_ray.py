"""The farm of a Ray cluster: an actor for each GPU, which measures in a process of its own as on this host.

An actor is given the bundle's files, so that nodes share no folder; hdispatch is installed on each. Imports ray.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import tempfile
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import ray

from ..errors import HdispatchError
from . import measure_process
from .card import Card
from .farm import Started, Task
from .measure_process import START_SECONDS, Lost, MeasureProcess, Setup, WorkerLost
from .timings import BROKE, Timing


def connect(address: str | None) -> bool:
    """Join a cluster: at an address, or else $RAY_ADDRESS's, one that runs here, or a new one of this host alone.

    False, and nothing is done, in a process that has joined one.
    """
    if ray.is_initialized():
        return False
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise HdispatchError(f"cannot join the Ray cluster at {address or 'the default address'}: {error}") from error
    return True


class Measurer:
    """The actor: it keeps the bundle's files, and a process that measures it."""

    def __init__(self, files: dict[str, bytes], task: Task, command: Sequence[str], version: str) -> None:
        self._files = files
        self._task = task
        self._command = command
        self._version = version
        self._process: MeasureProcess | None = None

    def ready(self) -> tuple[str, Card | None, dict[str, Any]]:
        """Where it is, the card and the versions, once it can measure."""
        node = ray.util.get_node_ip_address()
        if self._version != (here := importlib.metadata.version("hdispatch")):
            raise HdispatchError(
                f"node {node} has hdispatch {here}; install {self._version} there, as where the run is started"
            )
        process = self._opened()
        gpus = ",".join(map(str, ray.get_gpu_ids()))
        return f"GPU {gpus} of node {node}", process.card, process.versions

    def measure(self, cell: int, skip: list[int]) -> list[Timing] | Lost:
        """As a worker does; the process is replaced where a candidate was the end of it."""
        process = self._process or self._opened()
        found = process.measure(cell, skip)
        if isinstance(found, Lost) or any(line["status"] in BROKE for line in found):
            process.close()
            self._process = None
        return found

    def _opened(self) -> MeasureProcess:
        """A process that has read the bundle, which lies in a folder only as long as that takes."""
        with tempfile.TemporaryDirectory(prefix="hdispatch-tune-") as folder:
            for name, content in self._files.items():
                path = Path(folder) / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            # Ray shows an actor its own GPU alone.
            setup = Setup(folder, 0, self._task.seed, self._task.versions(), list(self._task.kernels))
            self._process = MeasureProcess(setup, self._task.timeout, self._command)
            self._process.ready()
        return self._process


class RayWorker:
    """An actor, seen from here; another one where it is lost."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self.name = "an actor"
        self.card: Card | None = None
        self.versions: dict[str, Any] = {}
        self._make = make
        self._actor: Any = make()

    def ready(self) -> None:
        """Wait until it can measure. `WorkerLost` if it is not there in time, `HdispatchError` if it cannot start."""
        self.name, self.card, self.versions = _answer(self._actor.ready.remote(), START_SECONDS)

    def measure(self, cell: int, skip: Collection[int]) -> list[Timing] | Lost:
        """The lines of a cell, as `Worker` says."""
        if self._actor is None:
            self._actor = self._make()
            before = self.card
            self.ready()
            if before is not None and self.card != before:
                raise WorkerLost(f"{self.name} came in its place and has another card")
        found: list[Timing] | Lost = _answer(self._actor.measure.remote(cell, sorted(skip)), None)
        return found

    def close(self) -> None:
        """End the actor, and with it its process."""
        actor, self._actor = self._actor, None
        if actor is not None:
            ray.kill(actor)


def _answer(reference: Any, seconds: float | None) -> Any:
    """What an actor answers. Its own errors are raised as they were; `WorkerLost` if it is gone, or late."""
    try:
        return ray.get(reference, timeout=seconds)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        raise (cause if isinstance(cause, HdispatchError) else HdispatchError(str(error))) from None
    except ray.exceptions.GetTimeoutError as error:
        raise WorkerLost(f"a Ray actor with a GPU has not started in {seconds:g} s") from error
    except ray.exceptions.RayError as error:
        raise WorkerLost(f"Ray lost it: {str(error).splitlines()[0]}") from error


class RayFarm:
    """Actors with a GPU each, on a cluster. `gpus`: how many; None: as many as the cluster has."""

    def __init__(self, address: str | None = None, gpus: int | None = None) -> None:
        self._workers: list[RayWorker] = []
        self.gpus = gpus
        self._joined = connect(address)

    def start(self, task: Task) -> Started:
        """The actors that can measure; a note for each that cannot. `HdispatchError` if there is no GPU or none can."""
        count = self._count()
        files = {str(path.relative_to(task.folder)): path.read_bytes() for path in task.folder.rglob("*") if path.is_file()}
        held = ray.put(files)
        actor = ray.remote(num_gpus=1, max_restarts=0)(Measurer)

        def make() -> Any:
            return actor.remote(held, task, measure_process.COMMAND, importlib.metadata.version("hdispatch"))

        self._workers = [RayWorker(make) for _ in range(count)]
        able, failures = [], []
        for worker in self._workers:
            try:
                worker.ready()
            except HdispatchError as error:
                worker.close()
                failures.append(error)
            else:
                able.append(worker)
        if not able:
            raise failures[0]
        return Started(able, [f"an actor is left out: {error}" for error in failures])

    def _count(self) -> int:
        there = int(ray.cluster_resources().get("GPU", 0))
        if not there:
            raise HdispatchError("the Ray cluster has no GPU; start its nodes with `ray start … --num-gpus N`")
        if self.gpus is not None and not 1 <= self.gpus <= there:
            raise HdispatchError(f"{self.gpus} GPUs are asked for; the Ray cluster has {there}")
        return self.gpus or there

    def close(self) -> None:
        """End the actors; leave the cluster if this has joined it."""
        for worker in self._workers:
            worker.close()
        if self._joined:
            ray.shutdown()
