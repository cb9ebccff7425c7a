"""GPU time of one cell of the op benchmark: every path's CUDA graph, replayed in random order, round by round."""

from __future__ import annotations

import functools
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from hdispatch import registry
from hdispatch.errors import HdispatchError, first_line
from hdispatch.testing.device_timer import Replay, interleave, rotation_count
from hdispatch.testing.host_timer import summarize

from . import peers
from .grid import Cell, call_bytes, call_flops, sizes_of

#: Intended time of one replay of a graph in µs, and its largest number of launches.
REPLAY_US = 600.0
MOST_LAUNCHES = 256
#: The least, where there are few sets: a graph's beginning and end, some µs, are in the figure.
LEAST_LAUNCHES = 4
#: For guessing the time of a launch before it is measured: bytes and operations per µs, and the least a launch takes.
GUESS_BYTES, GUESS_FLOPS, GUESS_LEAST = 3.5e6, 0.8e9, 1.7


class Timing(Cell):
    """A path in a cell: µs per launch; bytes and flops are what the call must move and compute."""

    path: str
    median_us: float
    q1_us: float
    q3_us: float
    bytes: int
    flops: int


class Failure(Cell):
    """A path that did not run in a cell, and why."""

    path: str
    reason: str


@dataclass
class Measured:
    """Timings of a cell."""

    timings: list[Timing] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)


#: Binds a path's call to arguments; None where the path has no such op.
Binder = Callable[[str, Sequence[Any]], peers.Bound | None]


def make_arguments(cell: Cell, device: torch.device, seed: int = 0) -> list[Any]:
    """Random arguments of a cell, laid out as vLLM has them."""
    spec = registry.spec(cell["op"])
    generator = torch.Generator(device).manual_seed(seed)
    sampled = spec.sample(spec.variant(cell["variant"]), sizes_of(cell), device, generator)
    return peers.arrange(spec, sampled)


def measure(cell: Cell, binders: Mapping[str, Binder], device: torch.device, rounds: int, order: random.Random) -> Measured:
    """Time every path that has the op, all in the same rounds and on the same buffers."""
    result = Measured()
    replays: dict[str, Replay] = {}
    arguments = make_arguments(cell, device)
    moved, flops = call_bytes(registry.spec(cell["op"]), arguments, cell["m"]), call_flops(cell)
    sets = [arguments]
    if cell["mode"] == "rotated":
        sets += [peers.copied(arguments) for _ in range(rotation_count(moved) - 1)]
    try:
        for path, bind in binders.items():
            try:
                if calls := _calls(bind, cell["op"], sets):
                    replays[path] = Replay(calls, launch_count(moved, flops, len(sets)))
            except Exception as error:  # a peer fails in any way it likes, and the others still run
                result.failures.append({**cell, "path": path, "reason": first_line(error)})
        for path, times in interleave(replays, rounds, order).items():
            stats = summarize(times)
            result.timings.append(
                {
                    **cell,
                    "path": path,
                    "median_us": round(stats.median_ns, 4),
                    "q1_us": round(stats.q1_ns, 4),
                    "q3_us": round(stats.q3_ns, 4),
                    "bytes": moved,
                    "flops": flops,
                }
            )
    finally:
        for replay in replays.values():
            replay.close()
    return result


def _calls(bind: Binder, op: str, sets: Sequence[Sequence[Any]]) -> list[Callable[[], object]]:
    bound = [each for arguments in sets if (each := bind(op, arguments)) is not None]
    if len(sets) == 1:
        return [functools.partial(call, *arguments) for call, arguments in bound]
    return [_keeping(call, arguments) for call, arguments in bound]


def _keeping(call: peers.Call, arguments: tuple[Any, ...]) -> Callable[[], object]:
    """The call, which keeps what it returned last: outputs of rotated calls must not share memory."""
    kept: list[object] = [None]

    def run() -> None:
        kept[0] = call(*arguments)

    return run


def launch_count(moved: int, flops: int, sets: int) -> int:
    """Launches in a graph: enough for a replay of REPLAY_US, between the bounds, and every set as often as the others."""
    guess = max(GUESS_LEAST, moved / GUESS_BYTES, flops / GUESS_FLOPS)
    turns = min(MOST_LAUNCHES, max(LEAST_LAUNCHES, int(REPLAY_US / guess))) // sets
    return max(1, turns) * sets


def copy_bandwidth(device: torch.device, size: int = 2**31, repeats: int = 15) -> float:
    """Bytes per second, read and written, of an element-wise kernel over `size` bytes: the median of `repeats`.

    A kernel, not `copy_`: in a graph that is a copy engine's, which on an H200 reaches 2.7 TB/s of 4.3.
    """
    source, target = (torch.zeros(size // 4, dtype=torch.float32, device=device) for _ in range(2))
    copy = Replay([functools.partial(torch.neg, source, out=target)], 3)
    seconds = statistics.median(copy.time() for _ in range(repeats)) * 1e-6
    copy.close()
    return 2 * size / seconds


def require_gpu() -> torch.device:
    """The current CUDA device; HdispatchError without one."""
    if not torch.cuda.is_available():
        raise HdispatchError(
            f"bench ops measures GPU time, and torch {torch.__version__} sees no CUDA device here; "
            "bench dispatch measures what needs none"
        )
    return torch.device("cuda", torch.cuda.current_device())
