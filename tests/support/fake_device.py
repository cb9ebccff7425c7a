"""A device for `tune measure` without a GPU: the null driver launches, the reference computes, and times are as told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hdispatch import registry
from hdispatch.tune import device
from hdispatch.tune.card import Card


class Timer:
    """Takes the time that it is told."""

    def __init__(self, us: float) -> None:
        self.us = us

    def time(self, _replays: int = 1) -> float:
        """Microseconds per launch."""
        return self.us

    def close(self) -> None:
        """Nothing is held."""


class FakeDevice(device.Device):
    """An H200 on which a row takes `us_of(row)` microseconds."""

    def __init__(self, us_of: Callable[[device.OneRow], float]) -> None:
        self.index = -1
        self.torch_device = torch.device("cpu")
        self.us_of = us_of
        self.us = 0.0
        #: The arguments of every launch.
        self.launched: list[Any] = []

    def device_count(self) -> int:
        """None: the null driver."""
        return 0

    def publish(self, rows: device.OneRow) -> device.Serve:
        """Remembers how fast the row will be."""
        self.us = self.us_of(rows)
        return super().publish(rows)

    def launch(self, op: Any, arguments: Any) -> None:
        """The null driver's launch, then the reference."""
        super().launch(op, arguments)
        self.launched.append(arguments)
        registry.spec(op.name).reference(*arguments)

    def synchronize(self) -> None:
        """There is nothing to wait for."""

    def estimate(self, _calls: Any) -> float:
        """As told."""
        return self.us

    def replay(self, _calls: Any, _launches: int) -> Timer:
        """As told."""
        return Timer(self.us)

    def queued(self, _serve: Any, _calls: Any, _launches: int) -> Timer:
        """As told."""
        return Timer(self.us)

    def card(self) -> Card:
        """A GPU that has a config file."""
        return {"name": "NVIDIA H200"}
