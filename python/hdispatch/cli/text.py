"""How the command line writes: tables, sizes, durations, progress."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

BAR_WIDTH = 30


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Columns in equal width, the first `left` aligned left and the others right."""
    widths = [max(len(line[column]) for line in (header, *rows)) for column in range(len(header))]
    lines = []
    for line in (header, *rows):
        cells = [cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def duration(ns: float) -> str:
    """With a unit that fits: 8.5 ns, 118 ns, 2.71 µs, 41.20 ms, 3.1 s."""
    for limit, unit, digits in ((10, 1, 1), (1e3, 1, 0), (1e6, 1e3, 2), (1e9, 1e6, 2)):
        if ns < limit:
            return f"{ns / unit:.{digits}f} {'ns' if unit == 1 else 'µs' if unit == 1e3 else 'ms'}"
    return f"{ns / 1e9:.1f} s"


def size(amount: float) -> str:
    """Bytes with a unit that fits."""
    for unit in ("B", "KiB", "MiB"):
        if amount < 1024:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} GiB"


def split(text: str | None) -> list[str] | None:
    """`a, b` -> ["a", "b"]; None if it was not given."""
    return [part.strip() for part in text.split(",") if part.strip()] if text is not None else None


def count(number: int, noun: str) -> str:
    """`1 row`, `2 rows`."""
    return f"{number} {noun}" + ("" if number == 1 else "s")


def machine_lines(machine: Mapping[str, Any]) -> list[str]:
    """The header of a result: the machine, the versions and the revision that it was measured with."""
    on = f"{machine['gpu']}, driver {machine['driver']}, " if machine["gpu"] else "no GPU, "
    tools = ("python", "torch", "triton", "helion", "hdispatch")
    versions = ", ".join(f"{name} {machine[name]}" for name in tools if machine.get(name))
    head, plus, changes = (machine["revision"] or "unknown").partition("+")
    return [
        f"{on}{machine['cpu']}, {machine['cores']} cores",
        f"{versions}, revision {head[:12]}{plus}{changes}, {machine['date']}",
    ]


def print_json(value: object) -> None:
    """One JSON document on stdout."""
    print(json.dumps(value, indent=1))


class Progress:
    """Progress on stderr: a bar that is redrawn on a terminal, elsewhere what runs first and a line per quarter; with the time
    that remains."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._quarter = 0
        self._drawn = 0.0
        self._start = time.monotonic()
        self._begun: set[str] = set()
        self._before: tuple[int, float] | None = None  # steps that took no time here, and when the others began

    def __call__(self, done: int, total: int, label: str) -> None:
        """So many of so many steps are done; the last one, or the one under way, is `label`."""
        now = time.monotonic()
        if self._before is None:  # several at once come from a cache
            self._before = (done, now) if done > 1 else (0, self._start)
        line = f"{done}/{total} {label}{self._remaining(done, total, now)}"
        if self._terminal:
            if done < total and now - self._drawn < 0.05:
                return
            filled = BAR_WIDTH * done // max(total, 1)
            bar = "█" * filled + "░" * (BAR_WIDTH - filled)
            width = shutil.get_terminal_size().columns - 1  # a line that wraps cannot be redrawn
            print("\r\x1b[K" + f"{bar} {line}"[:width], end="", file=sys.stderr, flush=True)
            self._drawn = now
        elif done == 0 and label not in self._begun:
            self._begun.add(label)
            print(line, file=sys.stderr, flush=True)
        elif (quarter := 4 * done // max(total, 1)) > self._quarter:
            self._quarter = quarter
            print(f"{line} ({now - self._start:.0f} s)", file=sys.stderr, flush=True)

    def _remaining(self, done: int, total: int, now: float) -> str:
        """Time for the remaining steps at the mean time of the finished ones: ", about 40 s left"."""
        before, began = self._before or (0, self._start)
        if done <= before or done >= total:
            return ""
        seconds = (now - began) / (done - before) * (total - done)
        if seconds < 2:
            return ""
        return f", about {seconds:.0f} s left" if seconds < 120 else f", about {seconds / 60:.0f} min left"

    def finish(self) -> None:
        """Take the bar away."""
        if self._terminal and self._drawn:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
