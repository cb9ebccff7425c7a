#!/usr/bin/env python3
"""What tuning a model would miss if it measured less: timings of other models choose, and this one's say what that costs.

    python benchmarks/left_out.py benchmarks/results/2026-11-*/*.jsonl.xz --out left-out.json

Of each op that the timings have, the sizes of one model are left out (of an op with one size one bucket). `tune select` chooses
from the other timings, of each file, and so of each card, by itself. Of a cell that was left out the candidates count that
`tune candidates --whole` has today. Their best time is compared with the best among

    chosen    those that were chosen for other sizes and buckets
    default   those that `tune candidates` measures, if what was chosen for the others were all config files

The regret is how much slower that is. A file that has times of less than half of `default` in a cell says nothing of it. Where
none of the chosen was measured, the list would be taken whole, at no regret. `share` is how many of the candidates remain.
docs/tuning.md has the table. No GPU; minutes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import lzma
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hdispatch import models
from hdispatch.compile import DESCRIBED, configs, op_package
from hdispatch.compile.op_package import OpPackage
from hdispatch.opspec import OpSpec
from hdispatch.tune import select, timings
from hdispatch.tune.chosen import Chosen
from hdispatch.tune.measured import Measured
from hdispatch.tune.point_configs import PointConfigs
from hdispatch.tune.points import Scope, sizes_of
from hdispatch.tune.timings import ConfigKey, Timing

#: The models whose sizes were measured.
MODELS = ("Qwen3-1.7B", "Qwen3-8B", "Qwen3-32B")
LIMIT = 0.02
POOLS = ("chosen", "default")
#: A cell: variant, K, N, bucket.
Cell = tuple[str, int, int, int]
#: By file the lines of an op.
Files = Mapping[str, Sequence[Timing]]


def read(paths: Iterable[Path], packages: Mapping[str, OpPackage]) -> dict[str, dict[str, list[Timing]]]:
    """The lines by op and file; those of sizes and buckets that there are no longer are left out."""
    refused = select.refusal(packages)
    found: dict[str, dict[str, dict[Any, Timing]]] = {}
    for path in paths:
        with lzma.open(path, "rt") as file:
            for line in map(json.loads, file):
                if line["op"] in packages and refused(line) is None:
                    key = timings.cell_key(line), timings.config_key(line)
                    found.setdefault(line["op"], {}).setdefault(str(path), {})[key] = line
    return {op: {path: list(lines.values()) for path, lines in files.items()} for op, files in found.items()}


def sizes(line: Timing) -> dict[str, int]:
    """The sizes that a line's op has, of K and N."""
    return {symbol: size for symbol, size in (("K", line["K"]), ("N", line["N"])) if size}


def parts(spec: OpSpec, lines: Sequence[Timing]) -> dict[str, Callable[[Timing], bool]]:
    """What is left out at a time: by name, whether a line is of it."""
    shapes = sorted({tuple(sizes(line).items()) for line in lines})
    of_model = {}
    for name in MODELS:
        rows = [row for _, row in models.calls_of(spec, models.find([name], 1)).rows]
        mine = {shape for shape in shapes if any(row.items() <= dict(shape).items() for row in rows)}
        if mine and len(mine) < len(shapes):
            of_model[name] = mine
    if len(shapes) == 1:
        return {f"bucket {b}": lambda line, b=b: line["bucket"] == b for b in sorted({line["bucket"] for line in lines})}
    alone = [shape for shape in shapes if not any(shape in mine for mine in of_model.values())]
    of_model |= {", ".join(f"{symbol}={size}" for symbol, size in shape): {shape} for shape in alone}
    return {name: lambda line, mine=mine: tuple(sizes(line).items()) in mine for name, mine in of_model.items()}


def lists(
    files: Mapping[str, Files], packages: Mapping[str, OpPackage], whole: bool
) -> dict[tuple[str, Cell], tuple[Any, ...]]:
    """For each measured cell of an op its point, and what is measured of all backends' lists where there is no config file."""

    def calls(spec: OpSpec) -> list[tuple[str, dict[str, int]]]:
        named = {symbol for row in spec.shapes for symbol in row}
        lines = [line for each in files[spec.name].values() for line in each]
        rows = {(line["variant"], tuple(item for item in sizes(line).items() if item[0] in named)) for line in lines}
        return [(variant, dict(row)) for variant, row in sorted(rows)]

    with tempfile.TemporaryDirectory() as empty:
        bare = [dataclasses.replace(packages[op], configs=Path(empty)) for op in files]
        found = PointConfigs(bare, Scope(calls=calls, whole=whole), DESCRIBED["h200"])
    cells = {}
    for point, options in found.by_point.items():
        every = sizes_of(point)
        cells[point.op.spec.name, (point.variant, every.get("K", 0), every.get("N", 0), point.bucket)] = (point, options)
    return cells


def chosen_without(
    package: OpPackage, files: Files, inside: Callable[[Timing], bool], folder: Path
) -> tuple[Chosen, dict[str, configs.ConfigFile]]:
    """What `tune select` chooses without the lines of a part: all of it, and a config file of each file."""
    (folder / "configs").mkdir()
    served = {}
    for index, (path, lines) in enumerate(files.items()):
        others = [line for line in lines if not inside(line)]
        if others:
            bare = dataclasses.replace(package, configs=folder / "none")
            (*_, report) = select.select(others, {package.name: bare}, folder / str(index), limit=LIMIT)
            served[path] = configs.read(report.path, package.spec)
            shutil.copy(report.path, folder / "configs" / f"{index}.json")
    return Chosen(dataclasses.replace(package, configs=folder / "configs")), served


def without(package: OpPackage, files: Files, known: Mapping[Any, Any], beside: Mapping[Any, Any]) -> dict[str, Any]:
    """An op's regrets, of every part that is left out."""
    spec = package.spec
    every = [line for lines in files.values() for line in lines]
    regrets: dict[str, list[tuple[float, str]]] = {pool: [] for pool in POOLS}
    offered = dict.fromkeys((*POOLS, "all"), 0)
    cells: set[tuple[str, Cell]] = set()
    for part, inside in parts(spec, every).items():
        with tempfile.TemporaryDirectory() as folder:
            chosen, served = chosen_without(package, files, inside, Path(folder))
        exact = {ConfigKey(chosen.backend_of(entry), timings.canonical(entry.config)) for entry in chosen.entries}
        for path, lines in files.items():
            mine = [line for line in lines if inside(line)]
            measured = Measured(spec, mine)
            for slot, found in measured.regrets.items():
                cell = *next(iter(measured.times[slot])), slot[1]
                point, listed = known[spec.name, cell]
                whole = {config: found[config] for config in beside[spec.name, cell][1] if config in found}
                if not whole:
                    continue
                named = [option for option in listed if option.backend in chosen.backends(package.backends)]
                variant, row = spec.variant(point.variant), dict(point.row)
                narrow = {
                    option
                    for backend in package.backends
                    for option in chosen.of(backend, row, variant, [each for each in named if each.backend == backend])
                }
                if 2 * len(narrow & found.keys()) < len(narrow):
                    continue
                if path in served:  # the config that serves the cell before it is tuned competes
                    entry = served[path].pick(spec, row, spec.ladders.edges(slot[1]), variant)
                    narrow.add(ConfigKey(chosen.backend_of(entry), timings.canonical(entry.config)))
                best = min(whole.values())
                cells.add((path, cell))
                offered["all"] += len(whole)
                for pool, kept in (("chosen", exact), ("default", narrow)):
                    left = [regret for config, regret in whole.items() if config in kept] or list(whole.values())
                    offered[pool] += len(left)
                    regrets[pool].append(((1 + min(left)) / (1 + best) - 1, f"{part}, {Path(path).parent.name}, {slot}"))
    slots = len(regrets["chosen"])
    result: dict[str, Any] = {
        "parts": list(parts(spec, every)),
        "cells": len(cells),
        "slots": slots,
        "candidates": offered["all"],
    }
    for pool, values in regrets.items() if slots else ():
        ordered = sorted(regret for regret, _ in values)
        result[pool] = {
            "share": round(offered[pool] / offered["all"], 4),
            "mean": round(statistics.fmean(ordered), 5),
            "p95": round(ordered[int(0.95 * (slots - 1))], 5),
            "worst": round(ordered[-1], 5),
            "where": max(values)[1],
        }
    return result


def main() -> None:
    """Compute, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("timings", metavar="FILE", type=Path, nargs="+", help="timings, .jsonl.xz")
    parser.add_argument("--out", metavar="FILE", type=Path, required=True, help="result, .json")
    arguments = parser.parse_args()
    packages = op_package.find(None)
    files = read(arguments.timings, packages)
    known, beside = lists(files, packages, False), lists(files, packages, True)
    ops = {}
    for op in sorted(files):
        ops[op] = without(packages[op], files[op], known, beside)
        print(op, ops[op], flush=True)
    result = {"files": [path.as_posix() for path in arguments.timings], "limit": LIMIT, "ops": ops}
    arguments.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
