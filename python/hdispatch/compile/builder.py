"""The build: ops and configs -> units -> records and artifacts, from the cache or from worker processes -> a bundle."""

from __future__ import annotations

import itertools
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..bundle_reader import read_files
from ..errors import BuildError
from ..manifest import artifacts_of
from ..opspec import OpSpec
from . import configs, op_package, store
from .build_unit import Built, BuiltEntry, Unit
from .default_configs import first_candidates
from .freeze import Entry, Frozen, freeze, freeze_onto
from .measurements import Measurements
from .op_package import OpPackage
from .out import check_out
from .pool import Pool, checked_jobs
from .recorded_kernels import RecordedKernels, build_recorded
from .target import GpuTarget, of_manifest, resolve
from .versions import missing, tool_versions

#: The shape of a row and its bucket.
Row = tuple[tuple[tuple[str, int], ...], int]


@dataclass
class BuildReport:
    """The result of a build.

    rows, records, cubins   of the bundle; cubins counts files
    recorded                specializations of recorded Triton kernels in it
    bytes                   of the bundle, all files
    sha256                  of its manifest: what `load(DIR, sha256=…)` takes
    seconds                 that this build took
    record_seconds          of each record by name, when it was built; the cache keeps them
    cache_hits              records that were not built now
    notes                   what a person should know: foreign configs, damaged cache files
    """

    out: Path
    target: GpuTarget
    rows: int = 0
    records: int = 0
    cubins: int = 0
    recorded: int = 0
    bytes: int = 0
    sha256: str = ""
    seconds: float = 0.0
    record_seconds: list[tuple[str, float]] = field(default_factory=list)
    cache_hits: int = 0
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Selection:
    """Less than everything, for tests and tuning: what is built of an op, or None for all of it."""

    shapes: Callable[[OpSpec], Iterable[dict[str, int]]] | None = None
    buckets: Callable[[OpSpec], Iterable[int]] | None = None
    variants: Callable[[OpSpec], Iterable[str]] | None = None

    @property
    def partial(self) -> bool:
        """Whether rows may be missing."""
        return any((self.shapes, self.buckets, self.variants))


def build(
    ops: Sequence[str] | None,
    target: str | GpuTarget,
    out: Path,
    *,
    jobs: int | None = None,
    cache: Path | None = None,
    select: Selection | None = None,
    extra: Sequence[str] = (),
    record: Sequence[Path] = (),
    more_configs: Path | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> BuildReport:
    """Builds the bundle `out` of ops for a GPU.

    ops       names, or None for all ops that have a kernel of a backend that is installed; with recordings none are needed
    target    "h200", "h100", "b200", "a100", "native" for the GPU that is here, or a description
    jobs      worker processes, one per CPU if None
    cache     folder of the build cache, else $HDISPATCH_CACHE, else ~/.cache/hdispatch
    extra     folders and dotted packages outside of hdispatch: ops, each with spec.py, helion.py or triton.py, and, once
              tuned, configs/<gpu>.json; or packages of ops. Those of installed distributions are known without
    record    recordings (recording.py), whose Triton kernels go into the bundle too; what cannot be built is in the notes
    more_configs  a folder whose <op>/<gpu>.json, as `tune select` writes them, come before the ops' own
    progress  called with units done, units in all and the name of the last one, or what runs

    BuildError, and no bundle, if anything cannot be built.
    """
    start = time.monotonic()
    gpu = resolve(target)
    count = checked_jobs(jobs)
    check_out(out)
    report = BuildReport(out, gpu)
    where = store.Store(cache if cache is not None else store.default_root())
    packages = {} if record and ops is not None and not ops else op_package.find(ops, extra)
    if ops is None:
        packages = _buildable(packages, report.notes)
    chosen = select or Selection()
    names = {package.package: name for name, package in packages.items()}
    folders = {name: _config_folders(package, more_configs) for name, package in packages.items()}
    if more_configs is not None and not any(configs.find_file(found[:1], gpu.config_file) for found in folders.values()):
        raise BuildError(
            f"{more_configs} has configs of none of the ops {', '.join(packages) or '(none is built)'}: it takes "
            f"{more_configs}/<op>/{gpu.config_file}, as `hdispatch tune --out` writes them"
        )
    with Pool(gpu, where.root) as workers:
        files = {
            name: _config_file(package, gpu, folders[name], workers, report.notes, progress)
            for name, package in packages.items()
        }
        units = [unit for name, package in packages.items() for unit in _units(package, files[name], chosen, report.notes)]
        without = {key for unit in units if unit.backend == configs.NO_ROW for key in _keys(names[unit.package], unit)}
        units = [unit for unit in units if unit.backend != configs.NO_ROW]
        built = _built(units, gpu, where, workers, count, report, progress) if units else []
        recorded = RecordedKernels()
    if record:
        with Pool(gpu, where.root) as workers:
            recorded = build_recorded(record, gpu, where, workers, count, progress)
    entries = [entry for unit, tools, each in built for entry in _entries_of(names[unit.package], unit, each, tools)]
    specs = {name: package.spec for name, package in packages.items()}
    frozen = freeze(
        specs,
        _with_times(entries, packages, files, gpu),
        gpu,
        where,
        out,
        partial=chosen.partial,
        without=without,
        recorded=recorded,
    )
    return _reported(report, frozen, recorded, where, start)


def build_onto(
    base: Path,
    record: Sequence[Path],
    out: Path,
    *,
    jobs: int | None = None,
    cache: Path | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> BuildReport:
    """Builds the bundle `out`: all of the bundle `base`, and the Triton kernels of recordings, for the GPU that it is for.

    The rows may come from elsewhere, as a wheel's do: the recorded kernels are compiled with the Triton that is installed here.
    Other arguments and errors: see `build`. BundleError if `base` is not a whole bundle.
    """
    start = time.monotonic()
    count = checked_jobs(jobs)
    check_out(out)
    there = read_files(base)
    gpu = of_manifest(there.manifest["target"])
    where = store.Store(cache if cache is not None else store.default_root())
    with Pool(gpu, where.root) as workers:
        recorded = build_recorded(record, gpu, where, workers, count, progress)
    frozen = freeze_onto(there, recorded, where, out)
    return _reported(BuildReport(out, gpu), frozen, recorded, where, start)


def _reported(report: BuildReport, frozen: Frozen, recorded: RecordedKernels, where: store.Store, start: float) -> BuildReport:
    """The report of a bundle that is written."""
    report.notes += recorded.notes()
    report.recorded, report.cache_hits = len(recorded.entries), report.cache_hits + recorded.cached
    report.notes += [f"the cache file {path} was damaged and has been rebuilt" for path in where.damaged]
    report.rows = len(frozen.manifest["rows"])
    report.records = len(frozen.manifest["records"])
    report.cubins = len(frozen.manifest["files"])
    report.bytes, report.sha256 = frozen.bytes, frozen.sha256
    report.seconds = time.monotonic() - start
    return report


def buildable_ops() -> list[str]:
    """The ops of `available_ops` that have a kernel of an installed backend."""
    return sorted(_buildable(op_package.find(None), []))


def _buildable(packages: Mapping[str, OpPackage], notes: list[str]) -> dict[str, OpPackage]:
    """The ops with a kernel of an installed backend; the others are noted."""
    found = {}
    for name, package in packages.items():
        absent = [missing(backend) for backend in package.backends]
        if all(absent):
            notes.append(f"{name} is left out: {absent[0]} is not installed")
        else:
            found[name] = package
    return found


def _config_folders(package: OpPackage, more: Path | None) -> list[Path]:
    """Where an op's config files are looked for, in order."""
    return [*([more / package.name] if more is not None else []), package.configs]


def _config_file(
    package: OpPackage,
    target: GpuTarget,
    folders: Sequence[Path],
    workers: Pool,
    notes: list[str],
    progress: Callable[[int, int, str], None] | None,
) -> configs.ConfigFile:
    """The op's config file, or one of its kernel's first candidates; a note if it is not the target's own."""
    found = configs.find(package.spec, target, *folders)
    if found is None:
        if progress:
            progress(0, 1, f"{package.name} has no configs: asking its {package.backends[0]} kernel for candidates")
        found = first_candidates(package, target, workers)
    file, note = found
    if note:
        notes.append(note)
    for folder in itertools.takewhile(lambda each: each != file.path.parent, folders):
        if others := sorted(path.name for path in folder.glob("nvidia_*.json") if not path.name.endswith(".tuned.json")):
            notes.append(f"{package.name}: {folder} has {', '.join(others)} and not {target.config_file}: {file.path} is used")
    return file


def _units(package: OpPackage, file: configs.ConfigFile, chosen: Selection, notes: list[str]) -> list[Unit]:
    """The units of an op: one per variant, config and sizes that are compiled in, with the rows it serves."""
    spec, backends = package.spec, package.backends
    file.require_backends(backends)
    file = _available(file, spec, backends, notes)
    variants = list(chosen.variants(spec)) if chosen.variants else [variant.name for variant in spec.served_variants()]
    shapes = list(chosen.shapes(spec)) if chosen.shapes else list(spec.shapes)
    for shape in shapes:
        if wrong := {symbol: value for symbol, value in shape.items() if not 1 <= value < 2**32}:
            raise BuildError(f"{spec.name}: the shape {shape} has {wrong}; sizes are 1 to {2**32 - 1}")
    buckets = list(chosen.buckets(spec)) if chosen.buckets else list(range(spec.ladders.count))
    return [unit for variant in variants for unit in _units_of(package, file, variant, shapes, buckets)]


def _units_of(
    package: OpPackage, file: configs.ConfigFile, variant: str, shapes: Sequence[dict[str, int]], buckets: Sequence[int]
) -> Iterator[Unit]:
    """The units of a variant. Of rows with the same sizes, as of shapes that differ in an open one, the first counts."""
    spec, of = package.spec, package.spec.variant(variant)
    units: dict[bytes, Unit] = {}
    taken: set[Row] = set()
    for shape in shapes:
        for bucket in buckets:
            entry = file.pick(spec, shape, spec.ladders.edges(bucket), of)
            backend = entry.backend or package.backends[0]
            generic = () if backend == configs.NO_ROW else package.generic[backend]
            known = {symbol: size for symbol, size in shape.items() if symbol not in generic}
            row = tuple(sorted(spec.row_shape(variant, shape).items())), bucket
            if row in taken:
                continue
            taken.add(row)
            key = store.canonical([backend, known, entry.config])
            unit = units.get(key) or Unit(package.package, backend, variant, known, entry.config, (), ())
            units[key] = replace(unit, buckets=tuple(sorted({*unit.buckets, bucket})), rows=(*unit.rows, row))
    yield from units.values()


def _keys(op: str, unit: Unit) -> Iterator[tuple[str, str, int, int, int]]:
    """The keys of the rows of a unit, as `freeze` names them: op, variant, K, N, bucket."""
    for shape, bucket in unit.rows:
        sizes = dict(shape)
        yield op, unit.variant, sizes.get("K", 0), sizes.get("N", 0), bucket


def _available(file: configs.ConfigFile, spec: OpSpec, backends: Sequence[str], notes: list[str]) -> configs.ConfigFile:
    """The file with the entries that count here, and a note if those are not all."""
    usual = file.available(backends, backends[0])
    absent = {backend: name for backend in backends if (name := missing(backend))}
    found = file.available([backend for backend in backends if backend not in absent], backends[0])
    if found.entries != usual.entries:
        notes.append(f"{spec.name}: {', '.join(absent.values())} is not installed; its rows take the best configs without it")
    return found


def _built(
    units: Sequence[Unit],
    target: GpuTarget,
    where: store.Store,
    workers: Pool,
    jobs: int,
    report: BuildReport,
    progress: Callable[[int, int, str], None] | None,
) -> list[tuple[Unit, dict[str, str], Built]]:
    """Every record with its unit and tools: those in the cache, then those that the workers build."""
    tools = {backend: tool_versions(backend, target) for backend in {unit.backend for unit in units}}
    sources = op_package.sources({unit.package for unit in units})
    keys = [record_key(unit, sources[unit.package], target, tools[unit.backend]) for unit in units]
    results: dict[int, list[Built]] = {}
    for index, key in enumerate(keys):
        if (found := find_built(units[index], key, where)) is not None:
            results[index] = found
    report.cache_hits = sum(len(built) for built in results.values())
    done = len(results)
    if progress and done:
        progress(done, len(units), "from the cache")
    missing = [index for index in range(len(units)) if index not in results]
    processes = min(jobs, len(missing))
    if progress and missing:
        progress(
            done, len(units), f"compiling in {processes} process{'es' if processes > 1 else ''}: {units[missing[0]].label}"
        )

    def make(position: int) -> list[Built]:
        unit = units[missing[position]]
        return workers.build(unit, tools[unit.backend])

    for position, built in workers.map(make, len(missing), jobs):
        index = missing[position]
        results[index] = built
        where.put("record", keys[index], {"built": built})
        done += 1
        if progress:
            progress(done, len(units), units[index].label)
    records = [(unit, tools[unit.backend], one) for index, unit in enumerate(units) for one in results[index]]
    report.record_seconds = [(unit.label, one["seconds"]) for unit, _, one in records]
    return records


def _with_times(
    entries: Sequence[Entry], packages: Mapping[str, OpPackage], files: Mapping[str, configs.ConfigFile], target: GpuTarget
) -> list[Entry]:
    """The entries with the times that tuning measured on this kind of GPU, of the configs that were taken."""
    found = {
        name: Measurements(package.spec, files[name].path.parent / target.config_file) for name, package in packages.items()
    }

    def with_times(entry: Entry) -> Entry:
        measurements, ladders = found[entry.op], packages[entry.op].spec.ladders
        edges = {bucket: ladders.edges(bucket) for bucket in entry.buckets}
        times = {bucket: measurements.of(entry.variant, entry.shape, edges[bucket], entry.record) for bucket in entry.buckets}
        return replace(entry, tuned={bucket: tuned for bucket, tuned in times.items() if tuned is not None})

    return [with_times(entry) for entry in entries]


def _entries_of(op: str, unit: Unit, built: Built, tools: dict[str, str]) -> list[Entry]:
    """One for each shape whose rows the record serves."""
    served: dict[tuple[tuple[str, int], ...], list[int]] = {}
    for shape, bucket in unit.rows:
        if bucket in built["buckets"]:
            served.setdefault(shape, []).append(bucket)
    return [
        Entry(
            op=op,
            variant=unit.variant,
            shape=dict(shape),
            buckets=tuple(buckets),
            record=built["record"],
            tools=tools,
            seconds=built["seconds"],
        )
        for shape, buckets in served.items()
    ]


def find_built(unit: Unit, key: str, where: store.Store) -> list[Built] | None:
    """The records of a unit from the cache: only if they serve all of its buckets, each once, and all their files are there."""
    found = where.get("record", key, BuiltEntry)
    if found is None or sorted(bucket for one in found["built"] for bucket in one["buckets"]) != sorted(unit.buckets):
        return None
    complete = all(where.has_blob(file) for one in found["built"] for file in artifacts_of(one["record"]))
    return found["built"] if complete else None


def record_key(unit: Unit, sources: Mapping[str, str], target: GpuTarget, tools: Mapping[str, str]) -> str:
    """Everything that the records of a unit depend on."""
    return store.digest(
        {
            "unit": {**unit.to_json(), "rows": []},
            "sources": dict(sources),
            "target": target.to_json(),
            "tools": dict(tools),
            "python": platform.python_version(),
        }
    )
