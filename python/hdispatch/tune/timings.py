"""Measured times, one JSON line per candidate and cell, appended to one file that survives being killed.

A cell's lines are written together when the cell is done, and are on disk before the next one begins: a run that is killed
loses at most the cell that it was at. A line that was cut off is left out when the file is read, and ended when more is
appended. A later line for the same candidate and cell replaces an earlier one.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, NotRequired, TypedDict, cast

from .. import typed_json
from ..errors import HdispatchError
from ..typed_json import Mismatch, check, parse
from .card import Card, alike, words

#: ok; a wrong result; not launched (a guard, the driver); took the process's GPU context or the process with it; never ended.
Status = Literal["ok", "wrong", "refused", "fatal", "timeout"]
#: After which the process that measured is of no more use. Such a candidate is not tried again, wherever it competes.
BROKE: tuple[Status, ...] = ("fatal", "timeout")


#: Numbers of a line that must be above 0, and those that must not be below.
POSITIVE = ("us", "q1", "q3", "stream_us", "warm_us", "M", "second")
NOT_NEGATIVE = ("K", "N", "bucket", "rounds", "compile_seconds", "device_seconds")


class CellKey(NamedTuple):
    """An op's variant at sizes and a bucket."""

    op: str
    variant: str
    k: int
    n: int
    bucket: int

    def __str__(self) -> str:
        return f"{self.op} {self.variant} K={self.k} N={self.n} bucket {self.bucket}"


class ConfigKey(NamedTuple):
    """A backend and a config as canonical JSON."""

    backend: str
    config: str


class CellHead(TypedDict):
    """A cell, the unit that a config is chosen for: an op's variant at sizes and a bucket.

    K, N    the sizes that are measured; 0 for one that the op has not
    M       the upper edge of the bucket: where it is measured
    second  likewise of the second ladder's integer, if the op has one
    """

    op: str
    variant: str
    K: int
    N: int
    bucket: int
    M: int
    second: NotRequired[int]


class Timing(CellHead):
    """One line: a candidate in a cell. Times are µs per launch in a replayed graph; absent where it was not timed.

    generic         sizes that are not compiled into the candidate's code
    artifacts       SHA-256 of the candidate's cubins
    why             what is wrong with it, if its status is not ok
    us, q1, q3      median and quartiles over `rounds`; a loser has fewer rounds than the winner, one far behind has none
                    and its us is an estimate
    stream_us       median of launches that are made one by one, for those that are not far behind in a graph
    warm_us         likewise median in a graph on the same buffers, of calls small enough to be found in L2 again
    compile_seconds what generating and compiling the record took, once for all of its cells
    device_seconds  this candidate's share of the time that its cell took on the GPU machine
    gpu, card       the card's name; the card, which lines of earlier versions have not
    """

    backend: str
    config: dict[str, Any]
    generic: list[str]
    artifacts: list[str]
    status: Status
    why: str
    us: NotRequired[float]
    q1: NotRequired[float]
    q3: NotRequired[float]
    stream_us: NotRequired[float]
    warm_us: NotRequired[float]
    rounds: int
    compile_seconds: float
    device_seconds: float
    gpu: str
    card: NotRequired[Card]
    versions: dict[str, Any]
    time: str


def canonical(config: dict[str, Any]) -> str:
    """A config as text: equal configs have equal texts."""
    return typed_json.canonical(config)


def cell_key(timing: Timing) -> CellKey:
    """The cell of a line."""
    return CellKey(timing["op"], timing["variant"], timing["K"], timing["N"], timing["bucket"])


def config_key(timing: Timing) -> ConfigKey:
    """The candidate of a line."""
    return ConfigKey(timing["backend"], canonical(timing["config"]))


def card_of(timing: Timing) -> Card:
    """The card of a line, as far as it says."""
    return timing["card"] if "card" in timing else {"name": timing["gpu"]}


def unlike_cards(timings: Iterable[Timing]) -> list[str]:
    """The cards of lines that cannot be compared, in words; empty if all can."""
    cards = {words(card_of(timing)): card_of(timing) for timing in timings}
    return sorted(cards) if any(not alike(a, b) for a in cards.values() for b in cards.values()) else []


def append(path: Path, timings: Sequence[Timing]) -> None:
    """Append lines; they are on disk when this returns. `HdispatchError` if they cannot be written."""
    text = "".join(json.dumps(timing, ensure_ascii=False) + "\n" for timing in timings)
    try:
        with path.open("ab+") as file:
            if file.tell() and _last_byte(file) != b"\n":
                file.write(b"\n")  # a line that was cut off
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise HdispatchError(f"cannot write {path}: {error.strerror}") from error


def _last_byte(file: Any) -> bytes:
    file.seek(-1, os.SEEK_END)
    return cast(bytes, file.read(1))


#: Why a line is refused, beyond `fault`; None if it is not.
Refusal = Callable[["Timing"], str | None]


def read(path: Path, refusal: Refusal = lambda _: None) -> list[Timing]:
    """Every whole line, the latest of each candidate and cell, in the order in which they were written.

    `HdispatchError` with file:line if a line is whole and yet no timing, or is refused, or if the file cannot be read.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise HdispatchError(f"cannot read the timings in {path}: {error.strerror}") from error
    found: dict[tuple[CellKey, ConfigKey], Timing] = {}
    for number, line in enumerate(lines, 1):
        timing = _parse(f"{path}:{number}", line, refusal)
        if timing is not None:
            key = cell_key(timing), config_key(timing)
            found.pop(key, None)  # in the order of the latest
            found[key] = timing
    return list(found.values())


def _parse(place: str, line: bytes, refusal: Refusal) -> Timing | None:
    """The timing of a line; None for an empty one or one that was cut off."""
    if not line.strip():
        return None
    if not line.startswith(b"{"):  # one that was cut off begins as a line does
        raise HdispatchError(f"{place}: no timing: it begins with {line[:20].decode(errors='replace')!r}")
    try:
        data = parse(line)
        check(data, Timing)
    except Mismatch as error:
        raise HdispatchError(f"{place}: no timing: {str(error).lstrip('. ')}") from error
    except ValueError:
        return None
    timing = cast(Timing, data)
    if (why := fault(timing) or refusal(timing)) is not None:
        raise HdispatchError(f"{place}: no timing to choose by: {why}")
    return timing


def fault(timing: Timing) -> str | None:
    """Why no op can have such a line; None if one can."""
    numbers = cast("dict[str, Any]", timing)
    for name in POSITIVE:
        if name in numbers and not 0 < numbers[name] < math.inf:
            return f"{name} is {numbers[name]}; it takes more than 0"
    for name in NOT_NEGATIVE:
        if not 0 <= numbers[name] < math.inf:
            return f"{name} is {numbers[name]}; it takes 0 or more"
    if ("us" in timing) != (timing["status"] == "ok"):
        return f"its status is {timing['status']!r}, and it has {'a' if 'us' in timing else 'no'} time"
    return None


def read_all(paths: Iterable[Path], refusal: Refusal = lambda _: None) -> list[Timing]:
    """The lines of several files; a later file's line replaces an earlier one's. Errors are those of `read`."""
    found = {(cell_key(timing), config_key(timing)): timing for path in paths for timing in read(path, refusal)}
    return list(found.values())
