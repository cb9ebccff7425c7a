"""The memory of a model's layers: one arena of the sequences that run them, on whatever stream vLLM lets them run."""

from __future__ import annotations

import math

import torch

from ...sequence import Arena

#: Largest arena in bytes: less than what vLLM's own activations take for the thousands of rows of a prefill.
LIMIT_BYTES = 80 << 20
#: Rows come in multiples of it: so the bytes of every temporary are multiples of its alignment, in proportion to the rows.
ROWS = 128
#: Where temporaries begin.
ALIGNMENT = 256


def rows_within(row_bytes: int, most: int, limit: int = LIMIT_BYTES) -> int:
    """The most rows, at most `most`, whose arena stays within `limit` bytes; a multiple of 128, which the last may pass `most`.

    At least 128, whatever they take.
    """
    return min(-(-most // ROWS), max(1, math.floor(limit / row_bytes) // ROWS)) * ROWS


class Workspace:
    """The arena for some rows.

    rows       a multiple of 128: those of a sequence's `max_rows`
    row_bytes  `arena_bytes` of the largest sequence, divided by its rows
    """

    def __init__(self, rows: int, row_bytes: int, device: torch.device) -> None:
        self.rows, self.row_bytes = rows, row_bytes
        self.memory = torch.empty(rows * row_bytes + ALIGNMENT, dtype=torch.uint8, device=device)
        self.arena = Arena(self.memory)

    def fits(self, row_bytes: int, device: torch.device) -> bool:
        """Whether it is one for sequences that take so much, on that device."""
        return self.row_bytes == row_bytes and self.memory.device == device
