"""A farm: workers that measure, one for each GPU. Those of this host are here; farm_ray.py has those of a Ray cluster."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from .. import _C
from ..errors import HdispatchError
from .card import Card, alike, words
from .measure_process import Lost, MeasureProcess, Setup
from .timings import Timing


@dataclass(frozen=True)
class Task:
    """Told to every worker: the candidate bundle, the seed of arguments and order, a step's seconds, versions and kernels.

    versions  called where a worker runs; its answer goes into that worker's lines
    kernels   folders and dotted packages of ops that are not installed
    """

    folder: Path
    seed: int
    timeout: float
    versions: Callable[[], dict[str, Any]]
    kernels: tuple[str, ...] = ()


class Worker(Protocol):
    """Measures one cell at a time on its GPU. `name` is for messages; card and versions go into its lines."""

    name: str
    card: Card | None
    versions: dict[str, Any]

    def measure(self, cell: int, skip: Collection[int]) -> list[Timing] | Lost:
        """The lines of a cell, by its index, without the records to skip; or that of the candidate that was the end of it.

        `WorkerLost` where the worker is gone and no candidate is to blame; other `HdispatchError`s end the run.
        """

    def close(self) -> None:
        """Give up what measured last; where another can be had, the next cell gets it. Any thread may call it."""


@dataclass
class Started:
    """The workers of a farm, and a line of text for each that could not be had."""

    workers: Sequence[Worker]
    notes: list[str] = field(default_factory=list)

    def keep_alike(self, wanted: Card | None) -> str:
        """Give up the workers whose cards are unlike `wanted`; None: unlike the card that most of them have.

        Returns the cards of those that are left out, in words.
        """
        cards = [worker.card or {"name": "unknown"} for worker in self.workers]
        if wanted is None:
            most = Counter(map(words, cards)).most_common(1)[0][0]
            wanted = next(card for card in cards if words(card) == most)
        kept, others = [], []
        for worker, card in zip(self.workers, cards, strict=True):
            if alike(card, wanted):
                kept.append(worker)
                continue
            worker.close()
            others.append(words(card))
            self.notes.append(f"{worker.name} is left out: it has {others[-1]}, and the timings are of {words(wanted)}")
        self.workers = kept
        return ", ".join(sorted(set(others)))


class Farm(Protocol):
    """Whoever can start workers."""

    def start(self, task: Task) -> Started:
        """The workers, ready to measure. `HdispatchError` if there is none."""

    def close(self) -> None:
        """End all of it."""


class LocalFarm:
    """GPUs of this host, each with a process of its own. `gpus`: how many; None: the current CUDA device alone."""

    def __init__(self, gpus: int | None = None) -> None:
        self.gpus = gpus
        self._workers: list[MeasureProcess] = []

    def start(self, task: Task) -> Started:
        """A process for each GPU; they start at the same time."""
        versions = task.versions()
        for index in self._indices():
            setup = Setup(str(task.folder.resolve()), index, task.seed, versions, list(task.kernels))
            self._workers.append(MeasureProcess(setup, task.timeout))
        for worker in self._workers:
            worker.ready()
        return Started(self._workers)

    def _indices(self) -> Sequence[int]:
        if self.gpus is None:
            return [current_device()]
        if self.gpus < 1:
            raise HdispatchError(f"{self.gpus} GPUs; a farm takes at least 1")
        if self.gpus > (there := torch.cuda.device_count()):
            raise HdispatchError(f"{self.gpus} GPUs are asked for; there are {there} here")
        return range(self.gpus)

    def close(self) -> None:
        """End the processes."""
        for worker in self._workers:
            worker.close()


def current_device() -> int:
    """The index of the CUDA device that is measured on by default. `HdispatchError` if there is none."""
    if not torch.cuda.is_available():
        raise HdispatchError(
            f"candidates are measured on a GPU, and there is none here ({_C.driver_missing() or 'torch sees none'}); "
            "take the candidate bundle to one"
        )
    return torch.cuda.current_device() if torch.cuda.is_initialized() else 0  # type: ignore[no-untyped-call]
