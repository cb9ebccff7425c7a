#!/usr/bin/env python3
"""Whether a benchmark got slower: two results, cell by cell.

    python benchmarks/regress.py OLD.json NEW.json [--paths hdispatch] [--percent 5] [--partial] [--gone op=rms_norm]
    python benchmarks/regress.py --newest benchmarks/results NEW.json

Results of `bench ops`, `bench dispatch`, `bench serve`, attention.py, attention_dense.py, serve_server.py and functional_op.py.
A cell is slower if its median exceeds the old one by more than `--percent` and by more than three times the larger of the two
quartile ranges, where a result has these. A cell that the new file lacks is lost, unless `--gone` names it or `--partial` says
that a part was measured; one that the old file lacks is counted. A file may be a .json.xz. `--newest DIR` compares with
the result in DIR, of the same GPU and layers, that has the most cells in common, of several the newest; where there is none it
says so and exits with 0. Exit 1 if a cell is slower or lost, 2 if none can be compared: none is in common, a file is no result,
or the GPUs, or the numbers of layers of the model (`bench serve --layers`), are unlike.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

#: Lost cells that are printed by name.
SHOWN = 10
#: Fields that are measured; the others name the cell.
MEASURED = ("median", "q1", "q3")
#: Fields that are neither: what follows from the cell, and ratios to other rows of the run.
DERIVED = ("bytes", "flops", "floor_ratio", "model", "label")


class Time(NamedTuple):
    """A measured cell, in the file's unit."""

    median: float
    spread: float


#: The names and values that tell a cell from others.
Cell = tuple[tuple[str, Any], ...]


class NoResultError(Exception):
    """A file is no result, and why."""


def refuse(why: object) -> NoReturn:
    """End: there is nothing to compare."""
    print(why, file=sys.stderr)
    sys.exit(2)


def load(file: Path) -> Any:
    """The JSON of a file, or of an xz."""
    try:
        data = file.read_bytes()
        return json.loads(lzma.decompress(data) if file.suffix == ".xz" else data)
    except (OSError, ValueError, lzma.LZMAError) as error:
        raise NoResultError(f"{file} is no result: {error}") from error


def machine_of(content: Any, field: str) -> str | None:
    """What a result says of the machine, if it does."""
    machine = content.get("machine") if isinstance(content, dict) else None
    return machine.get(field) if isinstance(machine, dict) else None


def layers_of(content: Any) -> str:
    """How many of its model's layers a result of `bench serve` is of; what older ones do not say is all."""
    layers = content.get("layers") if isinstance(content, dict) else None
    return "all" if layers is None else str(layers)


def cells_of(file: Path, content: Any, paths: list[str]) -> dict[Cell, Time]:
    """The cells of a result; all paths if none is given."""
    whole = content if isinstance(content, dict) else {}
    if isinstance(whole.get("modes"), dict):
        return of_values(file, served(whole), paths)
    if isinstance(whole.get("median_ns"), dict):
        return of_values(file, (({"op": "functional", "path": path}, ns) for path, ns in whole["median_ns"].items()), paths)
    return of_rows(file, whole.get("timings") or whole.get("rows"), paths)


def served(content: dict[str, Any]) -> Iterator[tuple[dict[str, Any], Any]]:
    """The times of a result of `bench serve` or serve_server.py; a rate as the ms that one takes."""
    common = {name: content.get(name) for name in ("model", "scheme", "ranks") if content.get(name) is not None}
    for mode, found in content["modes"].items():
        for group, op in (("batches", "ms per decode step"), ("prefills", "ms to the first token")):
            for size, ms in found.get(group, {}).items():
                yield {**common, "op": op, "path": mode, "size": size}, ms
        for requests, figures in found.get("concurrency", {}).items():
            for name in ("median_ttft_ms", "median_tpot_ms"):
                yield {**common, "op": name, "path": mode, "requests": requests}, figures.get(name)
            rate = figures.get("output_throughput")
            yield {**common, "op": "ms per token of output", "path": mode, "requests": requests}, rate and 1000 / rate


def of_values(file: Path, values: Iterator[tuple[dict[str, Any], Any]], paths: list[str]) -> dict[Cell, Time]:
    """Cells of times without quartiles; those without a time were not measured."""
    found = {}
    for fields, value in values:
        if value is None or (paths and fields["path"] not in paths):
            continue
        if not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise NoResultError(f"{file}: {fields} has {value!r}, which is no time above 0")
        found[tuple(sorted(fields.items()))] = Time(value, 0.0)
    return found


def of_rows(file: Path, rows: Any, paths: list[str]) -> dict[Cell, Time]:
    """Cells of rows with a median and quartiles."""
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise NoResultError(f'{file} is no result: it has no list of rows, "timings" or "rows", and no "modes"')
    found = {}
    for row in rows:
        unit = next((name.removeprefix("median") for name in row if name.startswith("median")), None)
        if unit is None:
            raise NoResultError(f"{file}: a row has no median: {row}")
        if paths and row.get("path") not in paths:
            continue
        measured = {f"{name}{unit}" for name in MEASURED}
        cell = tuple(sorted((name, value) for name, value in row.items() if name not in measured | set(DERIVED)))
        if not all(isinstance(row.get(name), (int, float)) and 0 < row[name] < math.inf for name in measured):
            raise NoResultError(f"{file}: a row has no times above 0: {row}")
        if cell in found:
            raise NoResultError(f"{file}: two rows are of one cell: {row}")
        found[cell] = Time(row[f"median{unit}"], row[f"q3{unit}"] - row[f"q1{unit}"])
    return found


def newest(folder: Path, new: Path, content: Any, paths: list[str]) -> Path | None:
    """The result in a folder that is of a result's GPU and has the most cells in common with it, of several the newest."""
    gpu, cells = machine_of(content, "gpu"), cells_of(new, content, paths)
    found = []
    for file in [*folder.rglob("*.json"), *folder.rglob("*.json.xz")]:
        try:
            other = load(file)
            date = machine_of(other, "date")
            alike = date and file.resolve() != new.resolve() and machine_of(other, "gpu") == gpu
            alike = alike and layers_of(other) == layers_of(content)
            common = len(cells.keys() & cells_of(file, other, paths).keys()) if alike else 0
            if common:
                found.append((common, date, file))
        except NoResultError:  # of another kind: folders of results hold many
            continue
    return max(found)[2] if found else None


def pairs(text: str) -> dict[str, str]:
    """`op=rms_norm,m=16` -> {"op": "rms_norm", "m": "16"}."""
    parts = [part.partition("=") for part in text.split(",")]
    if not all(name and sign for name, sign, _ in parts):
        raise argparse.ArgumentTypeError(f"{text!r} names no cells; it takes FIELD=VALUE,…, as op=rms_norm")
    return {name: value for name, _, value in parts}


def is_named(cell: Cell, names: list[dict[str, str]]) -> bool:
    """Whether one of the names is a cell's."""
    fields = {name: str(value) for name, value in cell}
    return any(each.items() <= fields.items() for each in names)


def words(cell: Cell) -> str:
    """A cell's name."""
    return ", ".join(f"{field} {value}" for field, value in cell)


def main() -> int:
    """Compare, print, and answer with the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, nargs="?")
    parser.add_argument("new", type=Path)
    parser.add_argument(
        "--newest", type=Path, metavar="DIR", help="compare with the newest of those in DIR with most of its cells"
    )
    parser.add_argument("--partial", action="store_true", help="a part was measured: cells that the new file lacks are counted")
    parser.add_argument(
        "--gone", type=pairs, metavar="FIELD=VALUE,…", action="append", default=[], help="cells that may be gone; repeatable"
    )
    parser.add_argument("--paths", default="", metavar="A,B", help="paths to judge (default: all)")
    parser.add_argument("--percent", type=float, default=5.0, help="what a cell may lose (default: %(default)s)")
    given = parser.parse_args()
    paths = [each for each in given.paths.split(",") if each]
    if (given.old is None) == (given.newest is None):
        parser.error("give either OLD or --newest DIR")
    try:
        after = load(given.new)
        if given.newest is not None:
            given.old = newest(given.newest, given.new, after, paths)
            if given.old is None:
                print(f"skipped: no result in {given.newest} is of {machine_of(after, 'gpu')} and has a cell of {given.new}")
                return 0
            print(f"{given.new} against {given.old}")
        before = load(given.old)
        old, new = cells_of(given.old, before, paths), cells_of(given.new, after, paths)
    except NoResultError as error:
        refuse(error)
    gpus = machine_of(before, "gpu"), machine_of(after, "gpu")
    if gpus[0] != gpus[1] and all(gpus):
        refuse(f"{given.old} is of {gpus[0]}, {given.new} of {gpus[1]}: a difference says nothing of the code")
    layers = layers_of(before), layers_of(after)
    if layers[0] != layers[1]:
        refuse(
            f"{given.old} is of {layers[0]} of the model's layers, {given.new} of {layers[1]}: measure both with the same "
            "`bench serve --layers`"
        )
    return compare(given, old, new)


def compare(given: argparse.Namespace, old: dict[Cell, Time], new: dict[Cell, Time]) -> int:
    """Print what differs; the exit status."""
    both = [cell for cell in old if cell in new]
    if not both:
        print(f"no cell is in both {given.old} ({len(old)} cells) and {given.new} ({len(new)} cells)")
        return 2
    slower = [cell for cell in both if is_slower(old[cell], new[cell], given.percent)]
    for cell in sorted(slower, key=lambda each: -new[each].median / old[each].median):
        times = f"{old[cell].median:.3f} -> {new[cell].median:.3f}"
        print(f"slower {new[cell].median / old[cell].median:6.3f} x  {times}  {words(cell)}")
    lost = [] if given.partial else [cell for cell in old if cell not in new and not is_named(cell, given.gone)]
    for cell in lost[:SHOWN]:
        print(f"lost  {words(cell)}")
    if lost:
        more = f"{len(lost) - SHOWN} more; " if len(lost) > SHOWN else ""
        print(f"lost  {more}--gone FIELD=VALUE,… names cells that may be gone, --partial says that a part was measured")
    for op in sorted({str(dict(cell).get("op")) for cell in both}):
        ratios = [new[cell].median / old[cell].median for cell in both if str(dict(cell).get("op")) == op]
        mean = math.exp(statistics.fmean(map(math.log, ratios)))
        print(f"{op:44} {len(ratios):4} cells, new / old {mean:.3f}, worst {max(ratios):.3f}")
    alone = f"{len(old) - len(both)} only in the old file, {len(new) - len(both)} in the new"
    print(f"{len(slower)} of {len(both)} cells slower; {alone}")
    return 1 if slower or lost else 0


def is_slower(old: Time, new: Time, percent: float) -> bool:
    """Beyond the allowance, and beyond the noise."""
    return new.median > old.median * (1 + percent / 100) and new.median - old.median > 3 * max(old.spread, new.spread)


if __name__ == "__main__":
    sys.exit(main())
