"""Helion's compiler on a machine without a GPU, told that tensors of the CPU lie on an H100.

Its heuristics then look at each kernel as they do on one: what they choose by is part of what Helion keys its variants on, and
their configurations are its defaults. Without this they fail at the number of multiprocessors, and are passed over.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

MULTIPROCESSORS = 132


@contextmanager
def on_h100() -> Iterator[None]:
    """Until the block ends. Imports helion."""
    import helion.runtime  # type: ignore[import-untyped]
    import torch
    from helion import _hardware
    from helion.autotuner import aot_cache  # type: ignore[import-untyped]

    info = _hardware.HardwareInfo("cuda", "NVIDIA H100 80GB HBM3", "13.0", "sm90")

    def get_num_sm(device: torch.device, *, reserved_sms: int = 0) -> int:
        return max(1, MULTIPROCESSORS - reserved_sms)

    def get_hardware_info(device: Any = None) -> Any:
        return info

    with (
        mock.patch.object(helion.runtime, "get_num_sm", get_num_sm),
        mock.patch.object(_hardware, "get_hardware_info", get_hardware_info),
        mock.patch.object(aot_cache, "get_hardware_info", get_hardware_info),
    ):
        yield
