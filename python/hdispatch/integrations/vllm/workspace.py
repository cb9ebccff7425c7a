"""The memory of a model's layers: one arena, in which buffers that are never needed at once share bytes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

#: What an arena may take: less than what vLLM's own activations take for the thousands of rows of a prefill.
LIMIT_BYTES = 80 << 20
#: Where buffers begin: enough for TMA and for vector loads.
ALIGNMENT = 256


@dataclass(frozen=True)
class Buffer:
    """A tensor [rows, width] that is needed in some steps of a layer.

    steps    numbers of the steps in which its content matters, those that write and read it included
    columns  stored by columns, [width, rows] transposed: as scales of groups are
    """

    name: str
    width: int
    dtype: torch.dtype
    steps: frozenset[int]
    columns: bool = False

    def size(self, rows: int) -> int:
        """Bytes of `rows` rows, rounded up to the alignment."""
        return -(-rows * self.width * self.dtype.itemsize // ALIGNMENT) * ALIGNMENT


def place(buffers: Sequence[Buffer], rows: int) -> dict[str, int]:
    """Name -> offset in bytes, such that buffers with a step in common do not overlap. Largest first, each as low as it can."""
    placed: list[tuple[int, int, Buffer]] = []
    for buffer in sorted(buffers, key=lambda each: -each.size(rows)):
        size, offset = buffer.size(rows), 0
        for begin, end, other in sorted(placed, key=lambda each: each[0]):
            if buffer.steps & other.steps and begin < offset + size and end > offset:
                offset = end
        placed.append((offset, offset + size, buffer))
    return {buffer.name: begin for begin, _, buffer in placed}


def total_size(buffers: Sequence[Buffer], rows: int) -> int:
    """Bytes of an arena for `rows` rows."""
    offsets = place(buffers, rows)
    return max((offsets[each.name] + each.size(rows) for each in buffers), default=0)


def rows_within(buffers: Sequence[Buffer], most: int, limit: int = LIMIT_BYTES) -> int:
    """The most rows, at most `most`, whose arena stays within `limit` bytes; a multiple of 128 where it is less than `most`.

    At least 128, whatever they take.
    """
    if total_size(buffers, most) <= limit:
        return most
    per_row = total_size(buffers, 1024) / 1024
    rows = max(128, math.floor(limit / per_row) // 128 * 128)
    while rows > 128 and total_size(buffers, rows) > limit:
        rows -= 128
    return min(rows, most)


class Arena:
    """One allocation on a device, and views of it for the first m of its rows."""

    def __init__(self, buffers: Iterable[Buffer], rows: int, device: torch.device) -> None:
        self.buffers = {buffer.name: buffer for buffer in buffers}
        self.rows = rows
        self.offsets = place(list(self.buffers.values()), rows)
        self.memory = torch.empty(total_size(list(self.buffers.values()), rows), dtype=torch.uint8, device=device)

    def fits(self, buffers: Iterable[Buffer], device: torch.device) -> bool:
        """Whether it is one for these buffers on that device."""
        return self.buffers == {buffer.name: buffer for buffer in buffers} and self.memory.device == device

    def view(self, name: str, m: int) -> torch.Tensor:
        """The tensor [m, width] of a buffer; m is at most `rows`."""
        buffer = self.buffers[name]
        size = m * buffer.width * buffer.dtype.itemsize
        flat = self.memory[self.offsets[name] : self.offsets[name] + size].view(buffer.dtype)
        return flat.view(buffer.width, m).t() if buffer.columns else flat.view(m, buffer.width)
