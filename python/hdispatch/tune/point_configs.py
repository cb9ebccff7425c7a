"""The configs that compete at each point: from the kernels' own lists, Helion, config files and the neighbouring buckets."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ..compile import candidate_lists, configs
from ..compile.build_unit import Unit
from ..compile.candidate_lists import Question
from ..compile.op_package import OpPackage
from ..compile.pool import Pool
from ..compile.target import GpuTarget
from ..compile.versions import OPTIONAL, missing
from ..errors import BuildError
from ..opspec import CALL_SYMBOLS, OpSpec
from .chosen import Chosen
from .points import Point, Scope, points_of, sizes_of
from .timings import ConfigKey, canonical

#: Which unit makes an option's record for a point; sizes that are not compiled in do not tell units apart.
UnitKey = tuple[OpPackage, str, ConfigKey, tuple[tuple[str, int], ...]]


class PointConfigs:
    """The options of all points, in order of preference."""

    def __init__(self, packages: Iterable[OpPackage], scope: Scope, target: GpuTarget) -> None:
        self.scope = scope
        #: The backends that are tuned, by op.
        self.backends = {package: backends_of(package) for package in packages}
        self.chosen = {package: Chosen(package) for package in self.backends}
        #: Those of them whose candidate lists are measured.
        self.asked = {package: self._asked(package) for package in self.backends}
        #: A line of text for each backend, file and entry that is left out.
        self.notes: list[str] = self._left_out()
        self.files = {package: config_files(package, scope, target, self.notes) for package in self.backends}
        #: The rows that are measured, and those that are not because others have the same sizes and more.
        self.points = [point for package in self.backends for point in points_of(package, scope)]
        self.open_points = [point for package in self.backends for point in points_of(package, scope, measured=False)]
        #: The sizes that an option is offered for any value of.
        self.opens: dict[tuple[OpPackage, ConfigKey], frozenset[str]] = {}
        own = self._collect(target)
        self.by_point = {point: _unique([*own[point], *self._nearby(point, own)]) for point in self.points}
        self.by_open_point = {point: own[point] for point in self.open_points}
        #: The buckets that a unit's option was meant for, without those that it is merely tried in.
        self.own_buckets: dict[UnitKey, set[int]] = {}
        for point, options in own.items():
            for option in options:
                self.own_buckets.setdefault(self.unit_key(point, option), set()).add(point.bucket)

    def _asked(self, package: OpPackage) -> list[str]:
        there, named = self.backends[package], self.scope.backends
        if named is not None:
            return [name for name in there if name in named]
        return there if self.scope.whole else self.chosen[package].backends(there)

    def _left_out(self) -> list[str]:
        """A note for each backend whose lists are left out because no config file chose it."""
        ops: dict[str, list[str]] = {}
        for package, there in self.backends.items() if self.scope.backends is None else ():
            for name in there:
                if name not in self.asked[package]:
                    ops.setdefault(name, []).append(package.name)
        return [
            f"left out: the candidates of {backend}, which no config file chose, of {', '.join(names)}; "
            f"--backends {backend} asks for them, --whole for all there is"
            for backend, names in ops.items()
        ]

    def unit_key(self, point: Point, option: ConfigKey) -> UnitKey:
        """The key of the unit that compiles an option at a point."""
        generic = point.op.generic[option.backend]
        return point.op, point.variant, option, tuple(item for item in point.row if item[0] not in generic)

    def units(self) -> dict[UnitKey, Unit]:
        """The units to compile."""
        rows: dict[UnitKey, list[tuple[tuple[tuple[str, int], ...], int]]] = {}
        for point, options in [*self.by_point.items(), *self.by_open_point.items()]:
            for option in options:
                rows.setdefault(self.unit_key(point, option), []).append((point.row, point.bucket))
        return {
            key: Unit(
                package=package.package,
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
            said = [option for backend in self.asked[point.op] for option in found[point, backend] or []]
            own[point] = _unique([*said, *self._from_files(point)])
            for backend in self.backends[point.op]:
                self._offer(point, backend, [option for option in own[point] if option.backend == backend])
        for point in self.open_points:
            near = [p for p in self.points if _speaks_for(p, point)]
            own[point] = []
            for backend in self.backends[point.op]:
                if not self._open_sizes(point) <= point.op.generic[backend]:
                    continue
                options = found.get((point, backend), [])
                if options is None:  # a list that wants every size; generic, it has the same for all: that of the points nearby
                    options = [option for p in near for option in own[p] if option.backend == backend]
                options = _unique([*options, *(o for o in self._from_files(point) if o.backend == backend)])
                self._offer(point, backend, options)
                own[point] += options
            for each in near:
                own[each] = _unique([*own[each], *own[point]])
        return own

    def _ask(self, target: GpuTarget) -> dict[tuple[Point, str], list[ConfigKey] | None]:
        """The configs of the kernels' lists and of Helion; None where a list needs a size that is open."""
        every = [*self.points, *self.open_points]
        groups: dict[tuple[OpPackage, str, str], list[Point]] = {}
        for point in every:
            for backend in self.asked[point.op]:
                groups.setdefault((point.op, backend, point.variant), []).append(point)
        questions = [self._question(package, backend, points) for (package, backend, _), points in groups.items()]
        found: dict[tuple[Point, str], list[ConfigKey] | None] = {}
        with Pool(target, Path()) as workers:  # lists keep nothing in the build cache
            answers = candidate_lists.ask(questions, workers)
        for ((_, backend, _), points), answer in zip(groups.items(), answers, strict=True):
            for point, said in zip(points, answer, strict=True):
                listed = None if said is None else [ConfigKey(backend, canonical(config)) for config in said]
                found[point, backend] = listed and self._narrowed(point, backend, listed)
        return found

    def _narrowed(self, point: Point, backend: str, listed: Sequence[ConfigKey]) -> list[ConfigKey]:
        if self.scope.whole:
            return list(listed)
        variant = point.op.spec.variant(point.variant)
        return self.chosen[point.op].of(backend, dict(point.row), variant, listed)

    def _question(self, package: OpPackage, backend: str, points: Sequence[Point]) -> Question:
        spec, generic, measured = package.spec, package.generic[backend], set(self.points)
        return Question(
            package=package.package,
            backend=backend,
            variant=points[0].variant,
            points=[{**dict(point.row), **spec.ladders.edges(point.bucket)} for point in points],
            full=[sizes_of(point) if point in measured else None for point in points],
            shapes=[{symbol: size for symbol, size in point.row if symbol not in generic} for point in points],
            radius=self.scope.radius,
        )

    def _open_sizes(self, point: Point) -> frozenset[str]:
        return frozenset(point.op.spec.symbols()) - {"M", *CALL_SYMBOLS, *(symbol for symbol, _ in point.row)}

    def _offer(self, point: Point, backend: str, options: Iterable[ConfigKey]) -> None:
        """Notes that options are meant for every value of the sizes that a point leaves open."""
        sizes = self._open_sizes(point)
        if sizes <= point.op.generic[backend]:
            for option in options:
                key = point.op, option
                self.opens[key] = self.opens.get(key, frozenset()) | sizes

    def _from_files(self, point: Point) -> list[ConfigKey]:
        """The config files' entries for a point; for a point that is not measured, those meant for open sizes."""
        spec, backends = point.op.spec, self.backends[point.op]
        first = point.op.backends[0]
        variant, edges = spec.variant(point.variant), spec.ladders.edges(point.bucket)
        entries = [file.pick(spec, dict(point.row), edges, variant) for file in self.files[point.op]]
        if any(point.row == other.row for other in self.open_points):
            entries = [entry for entry in entries if entry.sizes.keys() <= {*edges, *dict(point.row)}]
        found = [ConfigKey(entry.backend or first, canonical(entry.config)) for entry in entries]
        return [option for option in found if option.backend in backends]

    def _nearby(self, point: Point, own: Mapping[Point, Sequence[ConfigKey]]) -> list[ConfigKey]:
        """The options of the neighbouring buckets."""
        near = point.op.spec.ladders.near(point.bucket, self.scope.spread_of(point.op.spec))
        neighbours = [dataclasses.replace(point, bucket=bucket) for bucket in near]
        return [option for neighbour in neighbours for option in own.get(neighbour, ())]


def _unique(options: Iterable[ConfigKey]) -> list[ConfigKey]:
    return list(dict.fromkeys(options))


def _speaks_for(measured: Point, point: Point) -> bool:
    """Whether the open row of `point` would serve what is measured at the other."""
    same = dataclasses.replace(measured, row=()) == dataclasses.replace(point, row=())
    return same and dict(point.row).items() <= dict(measured.row).items()


def backends_of(package: OpPackage) -> list[str]:
    """The backends that an op has kernels for and that are installed, its default first.

    What cannot be built here is not tuned; if nothing can, all of them: the build says what is missing.
    """
    return [name for name in package.backends if missing(name) is None] or list(package.backends)


def config_files(package: OpPackage, scope: Scope, target: GpuTarget, notes: list[str]) -> list[configs.ConfigFile]:
    """The file that serves the card now, which must be valid, and those of further folders; an invalid one is left out."""
    spec, there = package.spec, package.backends
    files = []
    if (own := configs.find_file([package.configs], target.config_file)) is not None:
        files.append(configs.read(own, spec))
        files[0].require_backends(there)
    for path in (path for folder in scope.more for path in sorted((folder / spec.name).glob("*.json"))):
        if not path.name.endswith(".tuned.json") and (file := _further_file(path, spec, there, notes)) is not None:
            files.append(file)
    kinds = dict.fromkeys((there, tuple(name for name in there if name not in OPTIONAL)))
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


def strangers(scope: Scope, known: Iterable[str]) -> list[str]:
    """Notes about folders of config files that are of no op here."""
    folders = [path for folder in scope.more for path in sorted(folder.iterdir()) if path.is_dir() and path.name not in known]
    return [f"left out: {folder} is of no op here" for folder in folders if any(folder.glob("*.json"))]
