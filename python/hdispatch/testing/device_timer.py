"""GPU time of launches: replayed CUDA graphs over rotating arguments, candidates interleaved in random order.

A graph of many launches takes the host out of the figure; arguments that together exceed L2 keep a launch from finding its
inputs there; interleaving gives every candidate the same clocks and temperature. Importing needs no GPU.
"""

from __future__ import annotations

import contextlib
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch

from ..errors import HdispatchError

#: L2 of an H100 or H200 is 50 MB; a little more is asked for.
L2_BYTES = 60 * 2**20

#: GPU cycles, some 80 µs, that a replay waits for: so it is in the stream before the first event, and its launch untimed.
HEAD_START = 150_000
#: Per launch of `Queued`: 8 µs, which is more than the host takes.
QUEUED_HEAD_START = 15_000
#: Cycles of head start at which `elapsed_us` gives up: about a second.
LONGEST_HEAD_START = 2**31


def rotation_count(bytes_per_set: int, l2_bytes: int = L2_BYTES, cap_sets: int = 64, cap_bytes: int = 4 * 2**30) -> int:
    """How many argument sets of `bytes_per_set` bytes to rotate through: their sum exceeds twice L2, within the caps.

    At least one; small sets stop at `cap_sets` and may then all be in L2, which is where a server would find them too.
    """
    each = max(bytes_per_set, 1)
    return max(1, min(cap_sets, cap_bytes // each, 2 * l2_bytes // each + 1))


class Timed(Protocol):
    """Launches that can be timed, such as a `Replay`."""

    def time(self, replays: int = 1) -> float:
        """Microseconds per launch of `replays` replays in a row."""


class Replay:
    """A CUDA graph of `launches` launches that cycle through `calls`, each of which launches on the current stream.

    Every call is made once before, on a side stream of the current device, so that nothing is loaded during capture. What
    the calls hold must live as long as this; `close` frees the graph.
    """

    def __init__(self, calls: Sequence[Callable[[], object]], launches: int) -> None:
        if not calls or launches < 1:
            raise HdispatchError(f"{len(calls)} calls and {launches} launches; a replay takes at least one of each")
        self.launches = launches
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in calls:
                call()
            stream.synchronize()
            self._graph = _capture(calls, launches)
        torch.cuda.current_stream().wait_stream(stream)
        self._start, self._end = timing_event(), timing_event()
        self._graph.replay()  # the first replay uploads the graph

    def time(self, replays: int = 1) -> float:
        """Microseconds per launch of `replays` replays in a row on the current stream, by CUDA events; waits for them."""
        torch.cuda._sleep(HEAD_START)  # type: ignore[no-untyped-call]
        self._start.record()
        for _ in range(replays):
            self._graph.replay()
        self._end.record()
        self._end.synchronize()
        return float(self._start.elapsed_time(self._end)) * 1e3 / (self.launches * replays)

    def close(self) -> None:
        """Free the graph; nothing of it may be running."""
        self._graph.reset()


class Queued:
    """`launches` launches that cycle through `calls`, made one by one behind a kernel that waits until all are enqueued.

    So are those of a server that is ahead of its GPU, and the host is not in the figure; launches between which a graph would
    have an edge cost the GPU a little more. `prepare` is called before they are made.
    """

    def __init__(
        self, calls: Sequence[Callable[[], object]], launches: int, prepare: Callable[[], object] = lambda: None
    ) -> None:
        if not calls or launches < 1:
            raise HdispatchError(f"{len(calls)} calls and {launches} launches; at least one of each is needed")
        self.launches = launches
        self._calls = [calls[index % len(calls)] for index in range(launches)]
        self._prepare = prepare

    def time(self, replays: int = 1) -> float:
        """Microseconds per launch of `replays` times all launches, by CUDA events; waits for them."""
        self._prepare()
        self._calls[0]()
        return elapsed_us(lambda: self._make(replays), QUEUED_HEAD_START * replays * self.launches) / (self.launches * replays)

    def _make(self, replays: int) -> None:
        for _ in range(replays):
            for call in self._calls:
                call()

    def close(self) -> None:
        """Nothing is held."""


def _capture(calls: Sequence[Callable[[], object]], launches: int) -> torch.cuda.CUDAGraph:
    """The graph of the calls on the current stream. `torch.cuda.graph` would collect garbage each time, at 0.1 s."""
    graph = torch.cuda.CUDAGraph()
    graph.capture_begin(capture_error_mode="thread_local")
    try:
        for index in range(launches):
            calls[index % len(calls)]()
    except BaseException:
        with contextlib.suppress(RuntimeError):  # the capture is broken: what broke it is what to tell
            graph.capture_end()
        raise
    graph.capture_end()
    return graph


def elapsed_us(work: Callable[[], object], head_start: int = 0) -> float:
    """Microseconds between CUDA events around `work`, which enqueues on the current stream; waits for it.

    head_start   GPU cycles that the stream waits for before the first event. Where they end before all of `work` is
                 enqueued, the host would be in the figure: then it is done again, with twice as many.
    """
    torch.cuda.synchronize()
    start, end = timing_event(), timing_event()
    while head_start <= LONGEST_HEAD_START:
        if head_start:
            torch.cuda._sleep(head_start)  # type: ignore[no-untyped-call]
        start.record()
        work()
        is_late = bool(head_start) and start.query()  # type: ignore[no-untyped-call]
        end.record()
        end.synchronize()
        if not is_late:
            return float(start.elapsed_time(end)) * 1e3
        head_start *= 2
    raise HdispatchError(f"the host takes longer to enqueue the calls than {LONGEST_HEAD_START} cycles of the GPU")


def timing_event() -> torch.cuda.Event:
    """A CUDA event that has a time."""
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def interleave(
    replays: Mapping[str, Timed],
    rounds: int,
    rng: random.Random,
    early_stop: Mapping[int, float] | None = None,
    in_a_row: int = 1,
) -> dict[str, list[float]]:
    """Microseconds per launch of every replay, one figure per round, in a new random order in each round.

    early_stop   after so many rounds -> drop those whose median exceeds the best median by more than this factor. Those
                 dropped keep the figures they have: their lists are shorter.
    in_a_row     a figure is the mean of so many replays without a pause
    """
    times: dict[str, list[float]] = {name: [] for name in replays}
    running = list(replays)
    for done in range(1, rounds + 1):
        rng.shuffle(running)
        for name in running:
            times[name].append(replays[name].time(in_a_row))
        if early_stop and done in early_stop:
            medians = {name: statistics.median(times[name]) for name in running}
            limit = min(medians.values(), default=0.0) * early_stop[done]
            running = [name for name in running if medians[name] <= limit]
    return times
