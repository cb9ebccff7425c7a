"""Candidates: the config space of each kernel, compiled on any machine in parallel, deduplicated, and put into one bundle.

A *point* is what is measured: sizes and a bucket of M. Its *options*, configs of the op's kernels, come from the kernels' own
lists, Helion's fragments, the present config file, further config files, and the points of the neighbouring buckets. Equal
options of many points are compiled once for all of them; what cannot be compiled is left out and reported.
"""

from __future__ import annotations

import dataclasses
import json
import tarfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..compile import candidate_lists, configs, freeze, op_package, store
from ..compile.build_unit import Unit, load_spec
from ..compile.candidate_lists import Question
from ..compile.out import check_out
from ..compile.target import GpuTarget, resolve
from ..compile.versions import OPTIONAL, missing
from ..errors import BuildError
from ..manifest import CANDIDATES_NAME, Manifest, MClass, Record, class_of
from ..opspec import OpSpec
from .candidates import CANDIDATES_VERSION, Candidates, Cell, Dropped, Origin
from .compile_many import Attempts, Made
from .timings import ConfigKey, canonical


@dataclass(frozen=True)
class Scope:
    """Which candidates are collected.

    variants          of an op; its typical one if None: a config is chosen for all variants alike
    shapes, buckets   of an op; all if None
    more              folders with <op>/*.json in vLLM's format, e.g. vLLM's own or what `tune helion` wrote
    radius            how far Helion's seeds are varied: steps along each of its fragments; -1: nothing from Helion
    spread            the options of a bucket are tried in so many buckets to either side
    """

    variants: Callable[[OpSpec], Iterable[str]] | None = None
    shapes: Callable[[OpSpec], Iterable[dict[str, int]]] | None = None
    buckets: Callable[[OpSpec], Iterable[int]] | None = None
    more: tuple[Path, ...] = ()
    radius: int = 1
    spread: int = 1


@dataclass
class OpCandidates:
    """What an op brought.

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
    """What was made, by op; `bytes` of the bundle, `seconds` that making it took."""

    out: Path
    target: GpuTarget
    ops: dict[str, OpCandidates]
    bytes: int = 0
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)


def collect(
    ops: Sequence[str] | None,
    target: str | GpuTarget,
    out: Path,
    *,
    scope: Scope | None = None,
    jobs: int | None = None,
    cache: Path | None = None,
    extra: Sequence[str] = (),
    progress: Callable[[int, int, str], None] | None = None,
) -> CandidateReport:
    """Makes the candidate bundle `out`; arguments as those of `build`. BuildError if an op has no candidate that compiles."""
    start = time.monotonic()
    gpu = resolve(target)
    check_out(out)
    where = store.Store(cache if cache is not None else store.default_root())
    packages = op_package.find(ops, extra)
    report = CandidateReport(out, gpu, {name: OpCandidates() for name in packages})
    attempts = Attempts(gpu, where, jobs)
    found = Options(packages.values(), scope or Scope(), gpu)
    report.notes = [*_strangers(scope or Scope(), op_package.find(None, extra)), *found.notes]
    units = found.units()
    made = attempts.run(list(units.values()), [found.own_buckets[key] for key in units], progress)
    bundle = _Bundle(found, dict(zip(units, made, strict=True)))
    for name, package in packages.items():
        bundle.report(package, report.ops[name])
    report.bytes = bundle.write({name: load_spec(package) for name, package in packages.items()}, gpu, where, out)
    report.seconds = time.monotonic() - start
    return report


def archive(folder: Path, file: Path) -> None:
    """Packs a bundle into a .tar.xz that holds one folder of the bundle's name."""
    with tarfile.open(file, "w:xz") as packed:
        packed.add(folder.resolve(), arcname=folder.name)  # a link is followed, as for writing


# ---- which configs are measured where ----


@dataclass(frozen=True)
class Point:
    """What options are for: the rows of a shape, in a bucket. `row` has their sizes; one that it leaves out is open."""

    package: str
    variant: str
    row: tuple[tuple[str, int], ...]
    bucket: int


def points_of(package: str, scope: Scope, *, measured: bool = True) -> list[Point]:
    """The points of an op that are measured; or those that are not, because others have the same sizes and more."""
    spec = load_spec(package)
    variants = list(scope.variants(spec)) if scope.variants else [spec.typical_variant().name]
    rows = list(scope.shapes(spec)) if scope.shapes else list(spec.shapes)
    rows = [row for row in rows if any(row.items() < other.items() for other in rows) != measured]
    buckets = list(scope.buckets(spec)) if scope.buckets else list(range(spec.ladders.count))
    return [Point(package, variant, _items(row), bucket) for variant in variants for row in rows for bucket in buckets]


def sizes_of(point: Point) -> dict[str, int]:
    """All sizes to measure a point at, the buckets' edges included: open ones as the spec says."""
    spec = load_spec(point.package)
    hinted = {symbol: spec.measured.get(symbol, spec.hint(symbol)) for symbol in spec.symbols() if symbol != "M"}
    return {**hinted, **dict(point.row), **spec.ladders.edges(point.bucket)}


#: Which unit makes an option's record for a point; sizes that are not compiled in do not tell units apart.
UnitKey = tuple[str, str, ConfigKey, tuple[tuple[str, int], ...]]


class Options:
    """The options of all points, in order of preference."""

    def __init__(self, packages: Iterable[str], scope: Scope, target: GpuTarget) -> None:
        self.scope = scope
        self.specs = {package: load_spec(package) for package in packages}
        self.backends = {package: backends_of(package) for package in self.specs}
        self.generic = {
            (package, backend): op_package.generic_sizes(package, backend)
            for package, backends in self.backends.items()
            for backend in backends
        }
        #: Files and entries that are left out, in words.
        self.notes: list[str] = []
        self.files = {package: _config_files(package, scope, target, self.notes) for package in self.specs}
        #: What is measured; and the rows that are not, because others have the same sizes and more.
        self.points = [point for package in self.specs for point in points_of(package, scope)]
        self.open_points = [point for package in self.specs for point in points_of(package, scope, measured=False)]
        #: The sizes that an option is offered for any value of.
        self.opens: dict[tuple[str, ConfigKey], frozenset[str]] = {}
        own = self._collect(target)
        self.by_point = {point: _unique([*own[point], *self._nearby(point, own)]) for point in self.points}
        self.by_open_point = {point: own[point] for point in self.open_points}
        #: The buckets that a unit's option was meant for, without those that it is merely tried in.
        self.own_buckets: dict[UnitKey, set[int]] = {}
        for point, options in own.items():
            for option in options:
                self.own_buckets.setdefault(self.unit_key(point, option), set()).add(point.bucket)

    def unit_key(self, point: Point, option: ConfigKey) -> UnitKey:
        """Of an option at a point."""
        generic = self.generic[point.package, option.backend]
        return point.package, point.variant, option, tuple(item for item in point.row if item[0] not in generic)

    def units(self) -> dict[UnitKey, Unit]:
        """What is to be compiled."""
        rows: dict[UnitKey, list[tuple[tuple[tuple[str, int], ...], int]]] = {}
        for point, options in [*self.by_point.items(), *self.by_open_point.items()]:
            for option in options:
                rows.setdefault(self.unit_key(point, option), []).append((point.row, point.bucket))
        return {
            key: Unit(
                package=package,
                backend=option.backend,
                variant=variant,
                shape=dict(known),
                config=json.loads(option.config),
                buckets=tuple(sorted({bucket for _, bucket in rows[key]})),
                rows=tuple(rows[key]),
            )
            for key in rows
            for package, variant, option, known in (key,)
        }

    def _collect(self, target: GpuTarget) -> dict[Point, list[ConfigKey]]:
        """Every point's own options: what the kernels say, then the config files; then what is offered for open sizes."""
        found = self._ask(target)
        own: dict[Point, list[ConfigKey]] = {}
        for point in self.points:
            said = [option for backend in self.backends[point.package] for option in found[point, backend] or []]
            own[point] = _unique([*said, *self._from_files(point)])
            for backend in self.backends[point.package]:
                self._offer(point, backend, [option for option in own[point] if option.backend == backend])
        for point in self.open_points:
            near = [p for p in self.points if _speaks_for(p, point)]
            own[point] = []
            for backend in self.backends[point.package]:
                if not self._open_sizes(point) <= self.generic[point.package, backend]:
                    continue
                options = found[point, backend]
                if options is None:  # a list that wants every size; generic, it has the same for all: that of the points nearby
                    options = [option for p in near for option in own[p] if option.backend == backend]
                options = _unique([*options, *(o for o in self._from_files(point) if o.backend == backend)])
                self._offer(point, backend, options)
                own[point] += options
            for each in near:
                own[each] = _unique([*own[each], *own[point]])
        return own

    def _ask(self, target: GpuTarget) -> dict[tuple[Point, str], list[ConfigKey] | None]:
        """What the kernels' lists and Helion say; None where a list wants a size that is open."""
        every = [*self.points, *self.open_points]
        groups: dict[tuple[str, str, str], list[Point]] = {}
        for point in every:
            for backend in self.backends[point.package]:
                groups.setdefault((point.package, backend, point.variant), []).append(point)
        questions = [self._question(package, backend, points) for (package, backend, _), points in groups.items()]
        found: dict[tuple[Point, str], list[ConfigKey] | None] = {}
        for ((_, backend, _), points), answer in zip(groups.items(), candidate_lists.ask(questions, target), strict=True):
            for point, said in zip(points, answer, strict=True):
                found[point, backend] = None if said is None else [ConfigKey(backend, canonical(config)) for config in said]
        return found

    def _question(self, package: str, backend: str, points: Sequence[Point]) -> Question:
        spec, generic, measured = self.specs[package], self.generic[package, backend], set(self.points)
        return Question(
            package=package,
            backend=backend,
            variant=points[0].variant,
            points=[{**dict(point.row), **spec.ladders.edges(point.bucket)} for point in points],
            full=[sizes_of(point) if point in measured else None for point in points],
            shapes=[{symbol: size for symbol, size in point.row if symbol not in generic} for point in points],
            radius=self.scope.radius,
        )

    def _open_sizes(self, point: Point) -> frozenset[str]:
        return frozenset(self.specs[point.package].symbols()) - {"M", *(symbol for symbol, _ in point.row)}

    def _offer(self, point: Point, backend: str, options: Iterable[ConfigKey]) -> None:
        """Notes that options are meant for every value of the sizes that a point leaves open."""
        sizes = self._open_sizes(point)
        if sizes <= self.generic[point.package, backend]:
            for option in options:
                key = point.package, option
                self.opens[key] = self.opens.get(key, frozenset()) | sizes

    def _from_files(self, point: Point) -> list[ConfigKey]:
        """What the config files have for a point: for one that is not measured, what was meant for open sizes."""
        spec, backends = self.specs[point.package], self.backends[point.package]
        first = op_package.backends_of(point.package)[0]
        variant, edges = spec.variant(point.variant), spec.ladders.edges(point.bucket)
        entries = [file.pick(spec, dict(point.row), edges, variant) for file in self.files[point.package]]
        if any(point.row == other.row for other in self.open_points):
            entries = [entry for entry in entries if entry.sizes.keys() <= {*edges, *dict(point.row)}]
        found = [ConfigKey(entry.backend or first, canonical(entry.config)) for entry in entries]
        return [option for option in found if option.backend in backends]

    def _nearby(self, point: Point, own: Mapping[Point, Sequence[ConfigKey]]) -> list[ConfigKey]:
        """The options of the neighbouring buckets."""
        near = self.specs[point.package].ladders.near(point.bucket, self.scope.spread)
        neighbours = [dataclasses.replace(point, bucket=bucket) for bucket in near]
        return [option for neighbour in neighbours for option in own.get(neighbour, ())]


def _items(sizes: Mapping[str, int]) -> tuple[tuple[str, int], ...]:
    return tuple(sorted(sizes.items()))


def _unique(options: Iterable[ConfigKey]) -> list[ConfigKey]:
    return list(dict.fromkeys(options))


def _speaks_for(measured: Point, point: Point) -> bool:
    """Whether the open row of `point` would serve what is measured at the other."""
    same = dataclasses.replace(measured, row=()) == dataclasses.replace(point, row=())
    return same and dict(point.row).items() <= dict(measured.row).items()


def backends_of(package: str) -> list[str]:
    """The backends that an op has kernels for and that are installed, its default first.

    What cannot be built here is not tuned; if nothing can, all of them: the build says what is missing.
    """
    there = op_package.backends_of(package)
    return [name for name in there if missing(name) is None] or there


def _config_files(package: str, scope: Scope, target: GpuTarget, notes: list[str]) -> list[configs.ConfigFile]:
    """The op's own file, which has to be right, and those of further folders, of which the others are left out and noted."""
    spec, there = load_spec(package), op_package.backends_of(package)
    files = []
    if (own := op_package.config_folder(package) / target.config_file).is_file():
        files.append(configs.read(own, spec))
        files[0].require_backends(there)
    for path in (path for folder in scope.more for path in sorted((folder / spec.name).glob("*.json"))):
        if not path.name.endswith(".tuned.json") and (file := _further_file(path, spec, there, notes)) is not None:
            files.append(file)
    kinds = dict.fromkeys((tuple(there), tuple(name for name in there if name not in OPTIONAL)))
    return [part for file in files for kind in kinds if (part := file.available(kind, there[0])).entries]


def _further_file(path: Path, spec: OpSpec, backends: Sequence[str], notes: list[str]) -> configs.ConfigFile | None:
    """A file with the entries for kernels that the op has; None, and a note, if there are none or it cannot be read."""
    try:
        file = configs.read(path, spec)
    except BuildError as error:
        notes.append(f"left out: {error}")
        return None
    kept = tuple(entry for entry in file.entries if (entry.backend or backends[0]) in backends)
    if others := sorted({entry.backend for entry in file.entries if entry not in kept and entry.backend}):
        notes.append(
            f"left out: {path}: {len(file.entries) - len(kept)} of {len(file.entries)} entries are for {', '.join(others)}; "
            f"{spec.name} has kernels of {', '.join(backends)}"
        )
    return configs.ConfigFile(path, kept) if kept else None


def _strangers(scope: Scope, known: Iterable[str]) -> list[str]:
    """Notes about folders of config files that are of no op here."""
    folders = [path for folder in scope.more for path in sorted(folder.iterdir()) if path.is_dir() and path.name not in known]
    return [f"left out: {folder} is of no op here" for folder in folders if any(folder.glob("*.json"))]


# ---- the bundle ----


@dataclass(frozen=True)
class _Competitor:
    """A record that competes at a point."""

    key: UnitKey
    record: Record
    seconds: float


class _Bundle:
    """What was compiled, by point."""

    def __init__(self, found: Options, made: Mapping[UnitKey, Made]) -> None:
        self.found = found
        self.made = made
        self.order = {key: index for index, key in enumerate(made)}
        self.same_code: dict[str, int] = dict.fromkeys(found.specs, 0)
        self.by_point = {point: self._competitors(point, options) for point, options in found.by_point.items()}
        self.by_open_point = {point: self._competitors(point, options) for point, options in found.by_open_point.items()}

    def _competitors(self, point: Point, options: Sequence[ConfigKey]) -> list[_Competitor]:
        """The records for a point, one for each code; of several with one code, the same one at every point."""
        edge = self.found.specs[point.package].ladders.edges(point.bucket)["M"]
        groups: dict[bytes, list[_Competitor]] = {}
        for option in options:
            key = self.found.unit_key(point, option)
            for built in self.made[key].built:
                if point.bucket in built["buckets"]:
                    same = _code(built["record"], class_of(edge))
                    groups.setdefault(same, []).append(_Competitor(key, built["record"], built["seconds"]))
        self.same_code[point.package] += sum(len(group) - 1 for group in groups.values())
        return [min(group, key=self._rank) for group in groups.values()]

    def _rank(self, competitor: _Competitor) -> tuple[int, int]:
        return -len(self.opens(competitor)), self.order[competitor.key]

    def opens(self, competitor: _Competitor) -> frozenset[str]:
        """The sizes that it is offered for any value of."""
        package, _, option, _ = competitor.key
        return self.found.opens.get((package, option), frozenset())

    def report(self, package: str, into: OpCandidates) -> None:
        """What an op brought. BuildError if nothing of it compiles."""
        mine = {key: made for key, made in self.made.items() if key[0] == package}
        cells = [each for point, each in self.by_point.items() if point.package == package and each]
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
            raise BuildError(f"{self.found.specs[package].name} has no candidate that compiles: {why}")

    def _dropped(self, key: UnitKey, why: str) -> Dropped:
        package, variant, option, _ = key
        name = self.found.specs[package].name
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
                op=self.found.specs[point.package].name,
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
                place = places[store.digest(freeze._with_files(each.record))]
                origins[place] = {"generic": sorted(self.opens(each)), "seconds": each.seconds}
            if competitors:
                cells.append(self._cell(point, [places[store.digest(freeze._with_files(c.record))] for c in competitors]))
        return {
            "version": CANDIDATES_VERSION,
            "manifest": sha256,
            "cells": cells,
            "origins": origins,
            "dropped": [self._dropped(key, made.problem) for key, made in self.made.items() if made.problem],
        }

    def _cell(self, point: Point, records: list[int]) -> Cell:
        sizes = sizes_of(point)
        spec = self.found.specs[point.package]
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
    """What is launched for a class of M, whatever config it came from."""
    if record["launcher"] == "tvm_ffi":
        return store.canonical({name: value for name, value in record.items() if name not in ("config", "m_min", "m_max")})
    launched: dict[str, Any] = {
        "cubin": record["cubins"].get(m_class),
        "grid": record["grid"],
        "params": record["params"],
        "guards": record["guards"],
    }
    return store.canonical(launched)
