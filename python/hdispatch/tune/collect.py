"""Candidates: the config space of each kernel, compiled on any machine in parallel, deduplicated, and put into one bundle.

A *point* is what is measured: sizes and a bucket of M. Its *options*, configs of the op's kernels, come from the kernels' own
lists and Helion's fragments, less what was never chosen (see chosen.py), the present config file, further config files, and the
points of the neighbouring buckets. Equal options of many points are compiled once for all of them; what cannot be compiled is
left out and reported.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..compile import freeze, op_package, store
from ..compile.op_package import OpPackage
from ..compile.out import check_out
from ..compile.pool import checked_jobs
from ..compile.target import GpuTarget, resolve
from ..errors import BuildError
from ..manifest import CANDIDATES_NAME, Manifest, MClass, Record, class_of
from ..opspec import OpSpec
from .candidates import CANDIDATES_VERSION, Candidates, Cell, Dropped, Origin
from .compile_many import Compilers, Made, compile_many
from .point_configs import PointConfigs, UnitKey, strangers
from .points import Point, Scope, sizes_of
from .timings import ConfigKey


@dataclass
class OpCandidates:
    """The counts of an op.

    options, units   distinct configs; what was to be compiled: an option once for all points that share its code
    from_cache       units that were compiled before
    records, cells   in the bundle; pairs: what is measured, the candidates of all cells
    same_code        options of cells that were left out because another one there has the same code
    seconds          of compiling, of all units, when they were compiled
    """

    options: int = 0
    units: int = 0
    from_cache: int = 0
    records: int = 0
    cells: int = 0
    pairs: int = 0
    same_code: int = 0
    seconds: float = 0.0
    dropped: list[Dropped] = field(default_factory=list)


@dataclass
class CandidateReport:
    """The result of `collect`, by op; `bytes` of the bundle, `seconds` that making it took."""

    out: Path
    target: GpuTarget
    ops: dict[str, OpCandidates]
    bytes: int = 0
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)


#: Seconds of a CPU that a candidate takes, roughly, and a worker process before its first.
CPU_SECONDS = {"triton": 1.0, "helion": 2.0, "cutedsl": 1.7}
WORKER_SECONDS = 20.0


@dataclass(frozen=True)
class Plan:
    """What is about to be compiled: units by op and backend, by so many processes at once; and what is left out of it."""

    units: Mapping[str, Mapping[str, int]]
    jobs: int
    notes: Sequence[str]

    @property
    def seconds(self) -> float:
        """Of CPUs, roughly, if the cache has none of it."""
        counts = [(backend, count) for of in self.units.values() for backend, count in of.items()]
        return self.jobs * WORKER_SECONDS + sum(CPU_SECONDS[backend] * count for backend, count in counts)


def collect(
    ops: Sequence[str] | None,
    target: str | GpuTarget,
    out: Path,
    *,
    scope: Scope | None = None,
    jobs: int | None = None,
    cache: Path | None = None,
    extra: Sequence[str] = (),
    compilers: Compilers | None = None,
    progress: Callable[[int, int, str], None] | None = None,
    planned: Callable[[Plan], None] | None = None,
) -> CandidateReport:
    """Makes the candidate bundle `out`; arguments as those of `build`, and `compilers` as of `compile_many`.

    planned   told what is compiled, before it is

    BuildError if an op has no candidate that compiles.
    """
    start = time.monotonic()
    gpu = resolve(target)
    check_out(out)
    where = store.Store(cache if cache is not None else store.default_root())
    packages = op_package.find(ops, extra)
    report = CandidateReport(out, gpu, {name: OpCandidates() for name in packages})
    count = checked_jobs(jobs if compilers is None else jobs or compilers.jobs())
    found = PointConfigs(packages.values(), scope or Scope(), gpu)
    report.notes = [*strangers(scope or Scope(), op_package.find(None, extra)), *found.notes]
    units = found.units()
    if planned:
        counts = {name: Counter(key[2].backend for key in units if key[0] is package) for name, package in packages.items()}
        planned(Plan(counts, min(count, len(units)), report.notes))
    made = compile_many(list(units.values()), [found.own_buckets[key] for key in units], gpu, where, jobs, compilers, progress)
    bundle = _Bundle(found, dict(zip(units, made, strict=True)))
    for name, package in packages.items():
        bundle.report(package, report.ops[name])
    report.bytes = bundle.write({name: package.spec for name, package in packages.items()}, gpu, where, out)
    report.seconds = time.monotonic() - start
    return report


# ---- the bundle ----


@dataclass(frozen=True)
class _Competitor:
    """A record that competes at a point."""

    key: UnitKey
    record: Record
    seconds: float


class _Bundle:
    """The compiled candidates, by point, and the bundle of them."""

    def __init__(self, found: PointConfigs, made: Mapping[UnitKey, Made]) -> None:
        self.found = found
        self.made = made
        self.order = {key: index for index, key in enumerate(made)}
        self.same_code: dict[OpPackage, int] = dict.fromkeys(found.backends, 0)
        self.by_point = {point: self._competitors(point, options) for point, options in found.by_point.items()}
        self.by_open_point = {point: self._competitors(point, options) for point, options in found.by_open_point.items()}

    def _competitors(self, point: Point, options: Sequence[ConfigKey]) -> list[_Competitor]:
        """The records for a point, one for each code; of several with one code, the same one at every point."""
        edge = point.op.spec.ladders.edges(point.bucket)["M"]
        groups: dict[bytes, list[_Competitor]] = {}
        for option in options:
            key = self.found.unit_key(point, option)
            for built in self.made[key].built:
                if point.bucket in built["buckets"]:
                    same = _code(built["record"], class_of(edge))
                    groups.setdefault(same, []).append(_Competitor(key, built["record"], built["seconds"]))
        self.same_code[point.op] += sum(len(group) - 1 for group in groups.values())
        return [min(group, key=self._rank) for group in groups.values()]

    def _rank(self, competitor: _Competitor) -> tuple[int, int]:
        return -len(self.opens(competitor)), self.order[competitor.key]

    def opens(self, competitor: _Competitor) -> frozenset[str]:
        """The sizes that it is offered for any value of."""
        package, _, option, _ = competitor.key
        return self.found.opens.get((package, option), frozenset())

    def report(self, package: OpPackage, into: OpCandidates) -> None:
        """Fill in the counts of an op. BuildError if none of its candidates compiles."""
        mine = {key: made for key, made in self.made.items() if key[0] is package}
        cells = [each for point, each in self.by_point.items() if point.op is package and each]
        into.options = len({key[2] for key in mine})
        into.units = len(mine)
        into.from_cache = sum(made.cached for made in mine.values())
        into.records = len({id(each.record) for cell in cells for each in cell})
        into.cells, into.pairs = len(cells), sum(len(cell) for cell in cells)
        into.same_code = self.same_code[package]
        into.seconds = sum(built["seconds"] for made in mine.values() for built in made.built)
        into.dropped = [self._dropped(key, made.problem) for key, made in mine.items() if made.problem]
        if not cells:
            why = into.dropped[0]["why"] if into.dropped else "its kernels list none, and it has no config file"
            raise BuildError(f"{package.name} has no candidate that compiles: {why}")

    def _dropped(self, key: UnitKey, why: str) -> Dropped:
        package, variant, option, _ = key
        name = package.name
        return {"op": name, "variant": variant, "backend": option.backend, "config": json.loads(option.config), "why": why}

    def write(self, specs: Mapping[str, OpSpec], target: GpuTarget, where: store.Store, out: Path) -> int:
        """Writes the bundle and candidates.json; returns the bytes of both."""

        def beside(manifest: Manifest, sha256: str) -> dict[str, bytes]:
            return {CANDIDATES_NAME: store.canonical(self._candidates(manifest, sha256)) + b"\n"}

        return freeze.freeze(specs, self._entries(), target, where, out, partial=True, beside=beside).bytes

    def _entries(self) -> list[freeze.Entry]:
        """Every record; the first candidate of a point serves its rows."""
        first: dict[int, dict[tuple[tuple[str, int], ...], list[int]]] = {}
        found: dict[int, tuple[Point, _Competitor]] = {}
        for point, competitors in [*self.by_point.items(), *self.by_open_point.items()]:
            for index, each in enumerate(competitors):
                found.setdefault(id(each.record), (point, each))
                if index == 0:
                    first.setdefault(id(each.record), {}).setdefault(point.row, []).append(point.bucket)
        return [
            freeze.Entry(
                op=point.op.spec.name,
                variant=point.variant,
                shape=dict(row),
                buckets=tuple(buckets),
                record=each.record,
                tools=self.made[each.key].tools,
                seconds=each.seconds,
            )
            for record, (point, each) in found.items()
            for row, buckets in first.get(record, {point.row: []}).items()
        ]

    def _candidates(self, manifest: Manifest, sha256: str) -> Candidates:
        places = {store.digest(record): index for index, record in enumerate(manifest["records"])}
        origins: list[Origin] = [{"generic": [], "seconds": 0.0} for _ in places]
        cells: list[Cell] = []
        for point, competitors in self.by_point.items():
            for each in competitors:
                place = places[store.digest(freeze.with_files(each.record))]
                origins[place] = {"generic": sorted(self.opens(each)), "seconds": each.seconds}
            if competitors:
                cells.append(self._cell(point, [places[store.digest(freeze.with_files(c.record))] for c in competitors]))
        return {
            "version": CANDIDATES_VERSION,
            "manifest": sha256,
            "cells": cells,
            "origins": origins,
            "dropped": [self._dropped(key, made.problem) for key, made in self.made.items() if made.problem],
        }

    def _cell(self, point: Point, records: list[int]) -> Cell:
        sizes = sizes_of(point)
        spec = point.op.spec
        cell: Cell = {
            "op": spec.name,
            "variant": point.variant,
            "K": sizes.get("K", 0),
            "N": sizes.get("N", 0),
            "bucket": point.bucket,
            "M": sizes["M"],
            "records": records,
        }
        if spec.second is not None:
            cell["second"] = sizes[spec.second.name]
        return cell


def _code(record: Record, m_class: MClass) -> bytes:
    """Identifies the launch for a class of M, whatever config it came from."""
    if record["launcher"] == "tvm_ffi":
        return store.canonical({name: value for name, value in record.items() if name not in ("config", "m_min", "m_max")})
    launched: dict[str, Any] = {
        "cubin": record["cubins"].get(m_class),
        "grid": record["grid"],
        "params": record["params"],
        "guards": record["guards"],
    }
    return store.canonical(launched)
