"""Calls of a sequence that come again with the same memory, replayed as CUDA graphs: one launch for all.

A driver call takes 2 to 5 µs of host time, and a decoder's step has hundreds: vLLM's forward of an 8B model took an H100's host
0.16 ms replayed, 1.19 launched. Making a graph takes all launches and more. So calls are as always until one comes for the
third time: with the same tensors' addresses, sizes and strides, the same integers, the same launch table, on the same stream.
Then it is captured, on a stream of its own, and replayed from there on.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from . import _C

#: Graphs that are kept.
MOST = 128
#: Calls after which a graph that was not used makes room for another. Sooner, graphs would be made and dropped in turn, which
#: takes longer than the launches.
IDLE_CALLS = 4096
#: Calls that are remembered until they come again.
MOST_SEEN = 1024


@dataclass
class _Graph:
    graph: torch.cuda.CUDAGraph
    used: int = 0  #: number of the call that used it last


class Captures(Protocol):
    """What foreign steps need besides the capture itself: those whose arguments are not all known before."""

    def may_begin(self) -> bool:
        """Whether a capture may be made now; if not, the call is launched."""

    def is_ready(self) -> bool:
        """What `may_begin` would say, and nothing else."""

    def ended(self) -> None:
        """Called after each capture, also one that an error ended, and before its graph runs."""


class Replays:
    """A sequence, called as it is itself; for one thread at a time.

    sequence  what `Sequence.freeze` returned. Its foreign steps must be such that CUDA graphs may hold them
    most      graphs that are kept
    around    what its foreign steps need around a capture
    replays, captures  how many calls were replayed, and how many graphs were made

    A call that the launch table did not serve is never captured, nor one under a capture of somebody else's, which gets the
    launches themselves, or under a dispatch mode of torch's. A graph holds the kernels that it was made of, also those of a
    bundle that is unloaded since; it is not replayed then. `stats` counts a replayed call as a hit of the sequence, as one that
    was launched; the ops of its steps count what was launched or captured.
    """

    def __init__(self, sequence: _C.Sequence, *, most: int = MOST, around: Captures | None = None) -> None:
        self.sequence, self.most, self._around = sequence, most, around
        self.replays = self.captures = 0
        self._calls = 0
        self._graphs: OrderedDict[Hashable, _Graph] = OrderedDict()
        self._seen: OrderedDict[Hashable, bool] = OrderedDict()  # whether its last call was served
        self._streams: dict[int, torch.cuda.Stream] = {}

    def __call__(self, *slots: Any, **by_name: Any) -> None:
        """Run the sequence on the current stream of its tensors' device. Slots may be given by name, as to the sequence."""
        if by_name:
            slots = self.sequence.order_slots(*slots, **by_name)
        device = _device_of(slots)
        if device is None or device.type != "cuda":
            self.sequence(*slots)
            return
        if device.index != torch.cuda.current_device():
            with torch.cuda.device(device):  # whose capture is looked for, and on whose stream the graph runs
                self(*slots)
            return
        if _watcher() is not None:
            self.sequence(*slots)
            return
        stream = torch.cuda.current_stream(device)
        key = _key(stream, slots)
        self._calls += 1
        graph = self._graphs.get(key)
        is_new = graph is None
        if graph is None:
            if not self._seen.get(key) or not self._may_capture(stream):
                self._call(key, slots)
                return
            graph = self._capture(key, stream, slots)
        else:
            self._graphs.move_to_end(key)
        self.replays += 1
        graph.used = self._calls
        graph.graph.replay()
        if not is_new:  # the capture's call has been noted
            self.sequence.note_replay(*slots)

    def explain(self, *slots: Any, **by_name: Any) -> str:
        """What becomes of a call with these slots, and what the sequence says of it. Nothing is launched."""
        if by_name:
            slots = self.sequence.order_slots(*slots, **by_name)
        device = _device_of(slots)
        if device is None or device.type != "cuda":
            what = f"launched: on {device or 'no device'} nothing is captured"
        else:
            with torch.cuda.device(device):
                what = self._foresee(device, slots)
        counted = (
            f"{self.replays} calls replayed, {self.captures} captured, {len(self._graphs)} of at most {self.most} graphs kept"
        )
        return f"{what} ({counted})\n{_C.explain(self.sequence, *slots)}"

    def _foresee(self, device: torch.device, slots: tuple[Any, ...]) -> str:
        """What becomes of a call on the device that is current."""
        if watcher := _watcher():
            return f"launched: {watcher}"
        key = _key(torch.cuda.current_stream(device), slots)
        if key in self._graphs:
            return "replayed: it has a graph"
        if not self._seen.get(key):
            before = "its last one was its first, or not served" if key in self._seen else "this is its first one"
            return f"launched: the call after two that were served is captured, and {before}"
        if self._around is not None and not self._around.is_ready():
            return "launched: what its foreign steps need for a capture is not there yet"
        if not self._has_room(self._calls + 1):
            return f"launched: each graph that is kept was used within {IDLE_CALLS} calls, so that none makes room for its own"
        return "captured, then replayed: it has come twice"

    def _may_capture(self, stream: torch.cuda.Stream) -> bool:
        return (self._around is None or self._around.may_begin()) and self._make_room(stream)

    def _make_room(self, stream: torch.cuda.Stream) -> bool:
        """Whether there is room for one more graph: drop one that has long not been used, if all places are taken."""
        if not self._has_room(self._calls):
            return False
        if len(self._graphs) >= self.most:
            stream.synchronize()  # it may be running
            self._graphs.popitem(last=False)
        return True

    def _has_room(self, call: int) -> bool:
        """Whether a call of this number finds room for its graph."""
        if len(self._graphs) < self.most:
            return True
        oldest = next(iter(self._graphs.values()), None)
        return oldest is not None and call - oldest.used >= IDLE_CALLS

    def _call(self, key: Hashable, slots: tuple[Any, ...]) -> None:
        """As always; note whether a call that came before is served now."""
        again = key in self._seen
        before = self._hits()
        self.sequence(*slots)
        self._seen[key] = again and self._hits() == before + 1
        self._seen.move_to_end(key)
        if len(self._seen) > MOST_SEEN:
            self._seen.popitem(last=False)

    def _hits(self) -> int:
        return int(_C.sequence_stats()[self.sequence.name]["hits"])

    def _capture(self, key: Hashable, stream: torch.cuda.Stream, slots: tuple[Any, ...]) -> _Graph:
        """Make the graph of a call. Nothing runs."""
        aside = self._streams.setdefault(stream.cuda_stream, torch.cuda.Stream(stream.device))  # type: ignore[no-untyped-call]
        graph = torch.cuda.CUDAGraph()
        del self._seen[key]
        try:
            with torch.cuda.stream(aside):
                graph.capture_begin(capture_error_mode="thread_local")
                try:
                    self.sequence(*slots)
                except BaseException:
                    with suppress(RuntimeError):  # the capture may be broken; what broke it is raised
                        graph.capture_end()
                    raise
                graph.capture_end()
        finally:
            if self._around is not None:
                self._around.ended()
        self._graphs[key] = found = _Graph(graph)
        self.captures += 1
        return found


def _watcher() -> str | None:
    """Who wants launches to be made one by one: a mode that is to see every op, or somebody's capture. None: nobody."""
    if torch._C._len_torch_dispatch_stack() > 0:
        return "a dispatch mode of torch's sees every op"
    return "a capture is under way, which gets the launches" if torch.cuda.is_current_stream_capturing() else None


def _device_of(slots: tuple[Any, ...]) -> torch.device | None:
    return next((slot.device for slot in slots if isinstance(slot, torch.Tensor)), None)


def _key(stream: torch.cuda.Stream, slots: tuple[Any, ...]) -> Hashable:
    """What a graph is of: a stream, a launch table, and the slots' memory and values."""
    return stream.cuda_stream, _C.table_generation(stream.device.index), *map(_identity, slots)


def _identity(slot: Any) -> Hashable:
    """The facts about a slot's value that a graph depends on, and those for which the sequence would refuse a value."""
    if isinstance(slot, torch.Tensor):
        is_differentiated = slot.requires_grad and torch.is_grad_enabled()
        return slot.data_ptr(), slot.shape, slot.stride(), slot.dtype, type(slot), is_differentiated, slot.is_neg()
    return type(slot), slot if isinstance(slot, Hashable) else id(slot)
