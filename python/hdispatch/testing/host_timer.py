"""Host time per call: batches of calls, all subjects in random order in every round, median and quartiles over rounds.

Nothing is subtracted. The loop that makes the calls (some 10 ns per call) is in every figure, so time an empty call too.
"""

from __future__ import annotations

import gc
import os
import random
import statistics
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

#: Runs one batch of calls and returns ns per call.
Batch = Callable[[], float]
Label = TypeVar("Label", bound=Hashable)

#: Untimed calls at the head of each batch: another subject ran before, and the code is no longer in the core's caches.
WARM_CALLS = 10


@dataclass(frozen=True)
class Stats:
    """Median and quartiles of samples, in ns."""

    median_ns: float
    q1_ns: float
    q3_ns: float


def summarize(samples: Sequence[float]) -> Stats:
    """Median and quartiles (interpolated between samples). At least one sample."""
    if len(samples) == 1:
        return Stats(samples[0], samples[0], samples[0])
    q1, median, q3 = statistics.quantiles(samples, n=4, method="inclusive")
    return Stats(median, q1, q3)


def time_calls(call: Callable[..., object], batch: Sequence[tuple[Any, ...]]) -> float:
    """ns per call of `call(*arguments)` over a batch of arguments."""
    clock = time.perf_counter_ns
    start = clock()
    for arguments in batch:
        call(*arguments)
    return (clock() - start) / len(batch)


def call_batch(
    call: Callable[..., object],
    arguments: Callable[[], Sequence[tuple[Any, ...]]],
    warm: Sequence[tuple[Any, ...]] = (),
    synchronize: Callable[[], object] = lambda: None,
) -> Batch:
    """A batch of calls between two synchronizations.

    arguments   makes the arguments of one batch; not timed, and run right before the calls, so that what it made is as
                warm in the caches as what a caller has just made
    warm        arguments of untimed calls before
    """

    def run() -> float:
        batch = arguments()
        for each in warm:
            call(*each)
        synchronize()
        ns = time_calls(call, batch)
        synchronize()
        return ns

    return run


def interleave(
    batches: Mapping[Label, Batch], rounds: int, order: random.Random, tick: Callable[[], None] = lambda: None
) -> tuple[dict[Label, list[float]], dict[Label, Exception]]:
    """Every batch once per round, in an order drawn anew; `tick` is called after each round.

    Returns the samples, and for each batch that raised, which drops it, its error.
    """
    samples: dict[Label, list[float]] = {label: [] for label in batches}
    failed: dict[Label, Exception] = {}
    for _ in range(rounds):
        for label in order.sample(list(samples), len(samples)):
            try:
                samples[label].append(batches[label]())
            except Exception as error:
                failed[label] = error
                del samples[label]
        tick()
    return samples, failed


@contextmanager
def quiet() -> Iterator[int | None]:
    """This thread on one core and no garbage collection, until the block ends; gives the core, or None if not allowed.

    Threads and processes that start inside stay on that core: compile and warm up before.
    """
    collecting = gc.isenabled()
    allowed = os.sched_getaffinity(0)
    core: int | None = max(allowed)
    try:
        os.sched_setaffinity(0, {max(allowed)})
    except OSError:
        core = None
    gc.collect()
    gc.disable()
    try:
        yield core
    finally:
        if collecting:
            gc.enable()
        if core is not None:
            os.sched_setaffinity(0, allowed)
