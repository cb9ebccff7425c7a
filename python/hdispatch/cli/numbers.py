"""Numbers and lists on the command line: ASCII digits within bounds. Anything else is a wrong command line, and says why."""

from __future__ import annotations

import argparse
import math
import re

#: A row's K and N: what `hdispatch.load` takes.
LARGEST_SIZE = 2**32 - 1

_WHOLE = re.compile(r"-?[0-9]{1,19}")
_REAL = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


def whole(text: str) -> int:
    """`16`, `-1` -> an integer of 64 bits. Python's own reading takes `٣`, `1_000` and ` 3 ` too."""
    if not _WHOLE.fullmatch(text) or not -(2**63) <= int(text) < 2**63:
        raise argparse.ArgumentTypeError(f"{text[:80]!r} is no whole number; it takes digits, such as 16")
    return int(text)


def size(text: str) -> int:
    """`4096` -> a size of a row, 1 to 4294967295."""
    if not _WHOLE.fullmatch(text) or not 1 <= int(text) <= LARGEST_SIZE:
        raise argparse.ArgumentTypeError(f"{text[:80]!r} is no size; it takes 1 to {LARGEST_SIZE}")
    return int(text)


def real(text: str) -> float:
    """`0.02` -> a number that is finite."""
    if not _REAL.fullmatch(text) or not math.isfinite(float(text)):
        raise argparse.ArgumentTypeError(f"{text[:80]!r} is no number; it takes one such as 0.02")
    return float(text)


def words(text: str) -> tuple[str, ...]:
    """`a,b` -> ("a", "b")."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


def sizes(text: str) -> tuple[int, ...]:
    """`1,16` -> (1, 16); each at least 1."""
    if not (found := tuple(size(word) for word in words(text))):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of sizes; it takes such as 1,16")
    return found
