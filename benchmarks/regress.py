#!/usr/bin/env python3
"""Whether a benchmark got slower: two results of `bench ops`, `bench dispatch` or `benchmarks/attention.py`, cell by cell.

    python benchmarks/regress.py OLD.json NEW.json [--paths hdispatch] [--percent 5]

A cell is slower if its median exceeds the old one by more than `--percent` and by more than three times the larger of the two
quartile ranges. Cells that only one file has are counted, not judged. A file may be a .json.xz. Exit 1 if a cell is slower, 2
if none can be compared: there is none in common, a file is no result, or the two are of unlike GPUs.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

#: Fields that are measured; the others name the cell.
MEASURED = ("median", "q1", "q3")
#: Fields that are neither: what follows from the cell, and ratios to other rows of the run.
DERIVED = ("bytes", "flops", "floor_ratio", "model", "label")


class Time(NamedTuple):
    """A measured cell, in the file's unit."""

    median: float
    spread: float


def refuse(why: str) -> NoReturn:
    """End: there is nothing to compare."""
    print(why, file=sys.stderr)
    sys.exit(2)


def load(file: Path) -> Any:
    """The JSON of a file, or of an xz."""
    try:
        data = file.read_bytes()
        return json.loads(lzma.decompress(data) if file.suffix == ".xz" else data)
    except (OSError, ValueError, lzma.LZMAError) as error:
        refuse(f"{file} is no result: {error}")


def gpu_of(file: Path) -> str | None:
    """The GPU that a result is of, if it says."""
    content = load(file)
    machine = content.get("machine") if isinstance(content, dict) else None
    return machine.get("gpu") if isinstance(machine, dict) else None


def read(file: Path, paths: list[str]) -> dict[tuple[tuple[str, Any], ...], Time]:
    """The cells of a result; all paths if none is given."""
    content = load(file)
    rows = (content.get("timings") or content.get("rows")) if isinstance(content, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        refuse(f'{file} is no result: it has no list of rows, "timings" or "rows"')
    found = {}
    for row in rows:
        unit = next((name.removeprefix("median") for name in row if name.startswith("median")), None)
        if unit is None:
            refuse(f"{file}: a row has no median: {row}")
        if paths and row.get("path") not in paths:
            continue
        measured = {f"{name}{unit}" for name in MEASURED}
        cell = tuple(sorted((name, value) for name, value in row.items() if name not in measured | set(DERIVED)))
        if not all(isinstance(row.get(name), (int, float)) and 0 < row[name] < math.inf for name in measured):
            refuse(f"{file}: a row has no times above 0: {row}")
        if cell in found:
            refuse(f"{file}: two rows are of one cell: {row}")
        found[cell] = Time(row[f"median{unit}"], row[f"q3{unit}"] - row[f"q1{unit}"])
    return found


def main() -> int:
    """Compare, print, and answer with the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--paths", default="", metavar="A,B", help="paths to judge (default: all)")
    parser.add_argument("--percent", type=float, default=5.0, help="what a cell may lose (default: %(default)s)")
    given = parser.parse_args()
    paths = [each for each in given.paths.split(",") if each]
    old, new = read(given.old, paths), read(given.new, paths)
    if (before := gpu_of(given.old)) != (after := gpu_of(given.new)) and before and after:
        refuse(f"{given.old} is of {before}, {given.new} of {after}: a difference says nothing of the code")
    both = [cell for cell in old if cell in new]
    if not both:
        print(f"no cell is in both {given.old} ({len(old)} cells) and {given.new} ({len(new)} cells)")
        return 2
    slower = [cell for cell in both if is_slower(old[cell], new[cell], given.percent)]
    for cell in sorted(slower, key=lambda each: -new[each].median / old[each].median):
        name = ", ".join(f"{field} {value}" for field, value in cell)
        print(f"slower {new[cell].median / old[cell].median:6.3f} x  {old[cell].median:.3f} -> {new[cell].median:.3f}  {name}")
    for op in sorted({str(dict(cell).get("op")) for cell in both}):
        ratios = [new[cell].median / old[cell].median for cell in both if str(dict(cell).get("op")) == op]
        mean = math.exp(statistics.fmean(map(math.log, ratios)))
        print(f"{op:44} {len(ratios):4} cells, new / old {mean:.3f}, worst {max(ratios):.3f}")
    alone = f"{len(old) - len(both)} only in the old file, {len(new) - len(both)} in the new"
    print(f"{len(slower)} of {len(both)} cells slower; {alone}")
    return 1 if slower else 0


def is_slower(old: Time, new: Time, percent: float) -> bool:
    """Beyond the allowance, and beyond the noise."""
    return new.median > old.median * (1 + percent / 100) and new.median - old.median > 3 * max(old.spread, new.spread)


if __name__ == "__main__":
    sys.exit(main())
