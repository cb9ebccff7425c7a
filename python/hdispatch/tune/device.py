"""The CUDA device that candidates are measured on: serves one row, launches it, times it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from .. import _C
from ..ladders import Ladders
from ..manifest import Manifest, Record
from ..runtime import check_target
from ..testing.device_timer import Queued, Replay, Timed, timing_event
from .card import Card, read_card

#: Calls that the estimate is taken over.
ESTIMATE_CALLS = 4

Call = Callable[[], object]
#: Publishes a candidate's table.
Serve = Callable[[], None]


class Timeable(Timed, Protocol):
    """A `device_timer.Replay` or `Queued`, or a stand-in."""

    def close(self) -> None:
        """Free it."""


class Device:
    """The CUDA device that candidates are measured on."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.torch_device = torch.device("cuda", index)

    def publish(self, rows: OneRow) -> Serve:
        """Serve that one row, and nothing else; what is returned does so again, without loading its code once more."""
        builder = _C.TableBuilder(self.index, self.device_count(), True)
        builder.set_ladder(rows.op, rows.ladders.m, rows.ladders.second)
        add = builder.add_library if rows.record["launcher"] == "tvm_ffi" else builder.add_module
        for name, content in rows.files.items():
            add(name, content)
        builder.add_row(rows.op, rows.variant, rows.k, rows.n, rows.bucket, builder.add_record(rows.op, rows.record))
        table = builder.finish()
        _C.publish(table)
        return lambda: _C.publish(table)

    def device_count(self) -> int:
        """GPUs of this process."""
        return torch.cuda.device_count()

    def launch(self, op: _C.Op, arguments: Sequence[Any]) -> None:
        """One call, waited for."""
        op(*arguments)
        self.synchronize()

    def synchronize(self) -> None:
        """Wait; raises if the GPU has failed."""
        torch.cuda.synchronize(self.torch_device)

    def estimate(self, calls: Sequence[Call]) -> float:
        """Microseconds per call, at least what the host takes to make one."""
        start, end = timing_event(), timing_event()
        start.record()
        for index in range(ESTIMATE_CALLS):
            calls[index % len(calls)]()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e3 / ESTIMATE_CALLS

    def replay(self, calls: Sequence[Call], launches: int) -> Timeable:
        """A graph of launches."""
        return Replay(calls, launches)

    def queued(self, serve: Serve, calls: Sequence[Call], launches: int) -> Timeable:
        """Launches made one by one, while the row of `serve` is served."""
        return Queued(calls, launches, serve)

    def card(self) -> Card:
        """The GPU, as it goes into every timing."""
        return read_card(self.index)


@dataclass(frozen=True)
class OneRow:
    """The launch table of one candidate in one cell."""

    op: _C.Op
    ladders: Ladders
    variant: str
    k: int
    n: int
    bucket: int
    record: Record
    files: dict[str, bytes]


def open_device(folder: Path, manifest: Manifest, index: int) -> Device:
    """A CUDA device to measure a bundle on, current from now on. `BundleError` if the bundle is for another kind."""
    torch.cuda.init()  # type: ignore[no-untyped-call]
    torch.cuda.set_device(index)
    check_target(folder, manifest, index)
    return Device(index)
