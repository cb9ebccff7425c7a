"""From timings to config files: the fewest configs of an op that are nearly the best everywhere, and where each is used.

An op's *slots* are what its config file has keys for: a shape and a bucket. In a slot, a config's *regret* is how much
slower it is than the best config measured there (the worst over variants, and over sizes that the key does not tell apart).
A config *fits* a slot if its regret is within the limit; where none is, the one with the least regret fits.
"""

from __future__ import annotations

import functools
import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..compile import configs
from ..compile.measurements import companion
from ..compile.store import write_atomic
from ..compile.target import short_name
from ..compile.versions import OPTIONAL
from ..errors import BuildError
from ..opspec import SYMBOLS, OpSpec
from .timings import BROKE, ConfigKey, Refusal, Timing, cell_key, config_key, fault

#: A change of config between neighbouring buckets must gain this share of the limit: fewer edges are easier to read.
CHANGE = 0.25
#: Branches of the exact search before it settles for what it has.
MAX_BRANCHES = 200_000
#: The regret that drawing takes for a slot that no config of a set was measured in.
UNSERVED = 1.0
#: Further times of a candidate, besides `us`.
WAYS: tuple[Literal["stream_us", "warm_us"], ...] = ("stream_us", "warm_us")

#: Sizes of a key as sorted items, without M: (("K", 4096),); and a bucket.
Shape = tuple[tuple[str, int], ...]
Slot = tuple[Shape, int]
Regrets = Mapping[Slot, Mapping[ConfigKey, float]]


@dataclass(frozen=True)
class Choice:
    """The config of a slot: µs (the slowest variant's), the best config's µs there, and the regret."""

    config: ConfigKey
    us: float
    best_us: float
    regret: float


@dataclass
class OpReport:
    """What was selected for an op.

    candidates     configs that were measured; of them `wrong` gave wrong results somewhere and are out
    before         configs if each slot had its best one; kept: configs that were chosen
    entries        of the config file
    worst, mean    regret over the slots
    curve          (configs, worst regret, mean regret) for growing sets of configs, for drawing
    """

    op: str
    path: Path
    slots: int
    candidates: int
    wrong: int
    before: int
    kept: int
    entries: int
    worst: float
    mean: float
    compile_seconds: float
    device_seconds: float
    curve: list[tuple[int, float, float]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def select(
    timings: Sequence[Timing],
    specs: Mapping[str, OpSpec],
    folder_of: Callable[[str], Path],
    *,
    backends_of: Callable[[str], Sequence[str]],
    limit: float = 0.02,
    write: bool = True,
) -> list[OpReport]:
    """Selects for every op that has timings, and writes `<folder_of(op)>/nvidia_<gpu>.json` and `….tuned.json`.

    backends_of   the backends of an op, its default first
    limit         the regret that is allowed, 0.02 being 2 %

    Entries of a file for sizes that the timings do not have are kept. Where configs of an optional backend were chosen, the
    best without it are written too. BuildError for timings of several GPUs, or of an op, variant, backend, bucket or size that
    there is not, for an op without one right candidate, or a limit that is negative.
    """
    if not 0 <= limit < math.inf:
        raise BuildError(f"the regret is {limit}; it takes 0 or more, 0.02 being 2 %")
    if not timings:
        raise BuildError("there are no timings; make some with `hdispatch tune measure`")
    gpus = sorted({timing["gpu"] for timing in timings})
    if len(gpus) > 1:
        raise BuildError(f"the timings are of {gpus}; select for one GPU at a time")
    refused = refusal(specs, backends_of)
    for timing in timings:
        if (why := fault(timing) or refused(timing)) is not None:
            raise BuildError(f"a timing of {cell_key(timing)} cannot be chosen by: {why}")
    reports = []
    for op in sorted({timing["op"] for timing in timings}):
        own = [timing for timing in timings if timing["op"] == op]
        path = folder_of(op) / f"nvidia_{short_name(gpus[0])}.json"
        reports.append(_select_op(specs[op], own, path, backends_of(op)[0], limit, write))
    return reports


def refusal(specs: Mapping[str, OpSpec], backends_of: Callable[[str], Sequence[str]]) -> Refusal:
    """What timings say that these ops have not, a variant, backend, bucket or size: for `timings.read`, which names lines."""
    variants = functools.cache(lambda op: [variant.name for variant in specs[op].variants()])
    backends = functools.cache(lambda op: list(backends_of(op)))

    def refused(timing: Timing) -> str | None:
        op = timing["op"]
        if op not in specs:
            return f"it is of {op!r}, which is no op here; there are {sorted(specs)}"
        for name, value, there in (("variant", timing["variant"], variants(op)), ("backend", timing["backend"], backends(op))):
            if value not in there:
                return f"{name} is {value!r}; {op} has {there}"
        return _refused_sizes(specs[op], timing)

    return refused


def _refused_sizes(spec: OpSpec, timing: Timing) -> str | None:
    sizes = {"K": timing["K"], "N": timing["N"]}
    for symbol, size in sizes.items():
        if (size > 0) != (symbol in spec.symbols()):
            has = ", ".join(spec.symbols())
            return f"{symbol} is {size}; {spec.name} has the sizes {has}, and 0 stands for one that it has not"
    if not any(row.items() <= sizes.items() for row in spec.shapes):
        return f"K is {timing['K']} and N is {timing['N']}; {spec.name} has rows for {list(spec.shapes)}"
    if (bucket := timing["bucket"]) >= spec.ladders.count:
        return f"bucket is {bucket}; {spec.name} has {spec.ladders.count} of them, from 0"
    edges = spec.ladders.edges(bucket)
    if timing["M"] != edges["M"]:
        return f"M is {timing['M']}; bucket {bucket} of {spec.name} is measured at its edge, {edges['M']}"
    if (name := spec.ladders.arg) is not None and timing.get("second") != edges[name]:
        return f"second is {timing.get('second')}; bucket {bucket} of {spec.name} is measured at {name} = {edges[name]}"
    if unknown := sorted(set(timing["generic"]) - set(spec.symbols())):
        return f"generic names {unknown[0]!r}; {spec.name} has the sizes {', '.join(spec.symbols())}"
    return None


def _select_op(
    spec: OpSpec, timings: Sequence[Timing], path: Path, default_backend: str, limit: float, write: bool
) -> OpReport:
    measured = Measured(spec, timings)
    if not measured.regrets:
        raise BuildError(f"{spec.name}: no candidate gave a right result; see the timings' lines with status wrong or refused")
    choices, open_choices, notes = _assigned(measured, limit)
    chosen = {slot: measured.choice(slot, config) for slot, config in choices.items()}
    entries = _entries(spec, {**choices, **open_choices}, default_backend)
    for backend in OPTIONAL:
        entries += _stand_ins(spec, timings, {**choices, **open_choices}, default_backend, backend, limit)
    shapes = [{spec.config_key[k]: v for k, v in e["key"].items() if spec.config_key[k] in SYMBOLS[1:]} for e in entries]
    present = configs.read(path, spec).entries if path.exists() else ()
    others = [entry.raw for entry in present if entry.shape not in shapes]  # the default is the row for any size
    if others:
        notes.append(f"{len(others)} entries for sizes without timings are kept as they were")
    regrets = [choice.regret for choice in chosen.values()]
    used = {*choices.values(), *open_choices.values()}
    report = OpReport(
        op=spec.name,
        path=path,
        slots=len(choices),
        candidates=len({config_key(timing) for timing in timings}),
        wrong=len(measured.wrong),
        before=len({min(found, key=lambda c: found[c]) for found in measured.regrets.values()}),
        kept=len(used),
        entries=len(entries) + len(others),
        worst=max(regrets),
        mean=statistics.fmean(regrets),
        compile_seconds=_compile_seconds(timings),
        device_seconds=sum(timing["device_seconds"] for timing in timings),
        curve=curve(measured.regrets),
        notes=notes + [f"wrong results: {config.backend} {config.config}" for config in sorted(measured.wrong)],
    )
    if write:
        write_atomic(path, _text([*entries, *others]).encode())
        tuned = json.dumps(_companion(spec, timings, measured, chosen, report, limit), indent=1, ensure_ascii=False) + "\n"
        write_atomic(companion(path), tuned.encode())
    return report


def _assigned(measured: Measured, limit: float) -> tuple[dict[Slot, ConfigKey], dict[Slot, ConfigKey], list[str]]:
    """The configs of the slots, those of the rows that leave sizes open, and notes about the latter."""
    kept = cover(measured.regrets, limit)
    return assign(measured.regrets, kept, limit), *measured.open_rows(kept, limit)


def _stand_ins(
    spec: OpSpec,
    timings: Sequence[Timing],
    choices: Mapping[Slot, ConfigKey],
    default_backend: str,
    absent: str,
    limit: float,
) -> list[dict[str, Any]]:
    """Entries for the sizes that have configs of a backend, made without it: for where it is not installed."""
    shapes = {slot[0] for slot, config in choices.items() if config.backend == absent}
    measured = Measured(spec, [timing for timing in timings if timing["backend"] != absent])
    if not shapes or not measured.regrets:
        return []
    others, open_others, _ = _assigned(measured, limit)
    found = {slot: config for slot, config in {**others, **open_others}.items() if slot[0] in shapes}
    return [{"key": e.pop("key"), "without": absent, **e} for e in _entries(spec, found, default_backend)]


def _compile_seconds(timings: Sequence[Timing]) -> float:
    """Of each code once."""
    return sum({tuple(timing["artifacts"]): timing["compile_seconds"] for timing in timings}.values())


# ---- what was measured ----


class Measured:
    """An op's timings by slot."""

    def __init__(self, spec: OpSpec, timings: Sequence[Timing]) -> None:
        self.spec = spec
        #: Wrong at one place is wrong: nobody knows where else.
        self.wrong = {config_key(timing) for timing in timings if timing["status"] in ("wrong", *BROKE)}
        self.generic = {config_key(timing): frozenset(timing["generic"]) for timing in timings}
        lines: dict[Slot, dict[tuple[str, int, int], dict[ConfigKey, Timing]]] = {}
        for timing in timings:
            if "us" in timing and config_key(timing) not in self.wrong:
                slot = self._shape(timing), timing["bucket"]
                cell = timing["variant"], timing["K"], timing["N"]
                lines.setdefault(slot, {}).setdefault(cell, {})[config_key(timing)] = timing
        self.times = {slot: {cell: _weighed(found) for cell, found in cells.items()} for slot, cells in lines.items()}
        self.regrets: Regrets = {slot: found for slot, cells in self.times.items() if (found := _regrets(cells.values()))}

    def _shape(self, timing: Timing) -> Shape:
        """The sizes that the file's key has: all of them; or, for sizes tried on behalf of an open row, that row's."""
        sizes = {"K": timing["K"], "N": timing["N"]}
        named = _named(self.spec)
        exact = {symbol: size for symbol, size in sizes.items() if symbol in named}
        rows = [row for row in self.spec.shapes if all(sizes[symbol] == size for symbol, size in row.items())]
        row = max(rows, key=len, default=sizes)
        return tuple(sorted((symbol, size) for symbol, size in exact.items() if symbol in row))

    def choice(self, slot: Slot, config: ConfigKey) -> Choice:
        """A config in a slot, as measured."""
        cells = self.times[slot].values()
        us = max(cell[config] for cell in cells)
        return Choice(config, us, max(min(cell.values()) for cell in cells), self.regrets[slot][config])

    def by_backend(self, slot: Slot) -> dict[str, float]:
        """The best µs of each backend in a slot."""
        cells = self.times[slot].values()
        names = sorted({config.backend for cell in cells for config in cell})
        found: dict[str, float] = {}
        for name in names:
            best = [min((us for config, us in cell.items() if config.backend == name), default=None) for cell in cells]
            if None not in best:
                found[name] = max(us for us in best if us is not None)
        return found

    def open_rows(self, kept: Sequence[ConfigKey], limit: float) -> tuple[dict[Slot, ConfigKey], list[str]]:
        """Configs for the rows that leave sizes open while others have them: the best on average over those others.

        Of the kept configs, or else of all that are generic in the open sizes; a note for a row that has none.
        """
        chosen: dict[Slot, ConfigKey] = {}
        notes = []
        named = _named(self.spec)
        for row in self.spec.shapes:
            missing = {symbol for symbol in named if symbol not in row}
            shape: Shape = tuple(sorted((symbol, size) for symbol, size in row.items() if symbol in named))
            if not missing or any(slot[0] == shape for slot in self.regrets):
                continue
            averages = self._averages(dict(shape), missing)
            near = {slot: {c: r for c, r in found.items() if c in kept} for slot, found in averages.items()}
            near = {slot: found or averages[slot] for slot, found in near.items()}
            if not near:
                notes.append(f"no measured config is generic in {sorted(missing)}: the row for any size keeps its entry")
            chosen |= {(shape, slot[1]): config for slot, config in assign(near, None, limit).items()}
        return chosen, notes

    def _averages(self, row: Mapping[str, int], missing: set[str]) -> dict[Slot, dict[ConfigKey, float]]:
        """Mean regret over the shapes that a row would serve too, by bucket; of configs measured in most of them."""
        gathered: dict[int, dict[ConfigKey, list[float]]] = {}
        for (shape, bucket), found in self.regrets.items():
            if all(dict(shape).get(symbol) == size for symbol, size in row.items()):
                for config, regret in found.items():
                    if self.generic[config] >= missing:
                        gathered.setdefault(bucket, {}).setdefault(config, []).append(regret)
        averages: dict[Slot, dict[ConfigKey, float]] = {}
        for bucket, lists in gathered.items():
            most = max(len(each) for each in lists.values())
            averages[(), bucket] = {c: statistics.fmean(each) for c, each in lists.items() if len(each) == most}
        return averages


def _weighed(found: Mapping[ConfigKey, Timing]) -> dict[ConfigKey, float]:
    """A cell's µs: the mean over the ways in which the cell's candidates were timed, as an op is used in all of them.

    One that was so far behind in a graph that it was not timed otherwise is as far behind the best of all.
    """
    in_graph = {config: timing["us"] for config, timing in found.items()}
    ways = [way for way in WAYS if any(way in timing for timing in found.values())]
    means = {
        config: statistics.fmean([timing["us"], *(timing[way] for way in ways)])
        for config, timing in found.items()
        if ways and all(way in timing for way in ways)
    }
    factor = min(means.values()) / min(in_graph.values()) if means else 1.0
    return {config: means.get(config, us * factor) for config, us in in_graph.items()}


def _named(spec: OpSpec) -> list[str]:
    """The sizes besides M that the op's config keys name."""
    return [symbol for symbol in SYMBOLS[1:] if symbol in spec.config_key.values()]


def _regrets(cells: Iterable[Mapping[ConfigKey, float]]) -> dict[ConfigKey, float]:
    """The worst regret of each config that was measured in all cells of a slot."""
    cells = list(cells)
    common = set.intersection(*(set(cell) for cell in cells)) if cells else set()
    return {config: max(cell[config] / min(cell.values()) - 1 for cell in cells) for config in sorted(common)}


# ---- which configs ----


def fitting(found: Mapping[ConfigKey, float], limit: float) -> list[ConfigKey]:
    """The configs that fit a slot."""
    least = min(found.values())
    return [config for config, regret in found.items() if regret <= max(limit, least)]


def cover(regrets: Regrets, limit: float) -> list[ConfigKey]:
    """The fewest configs of which one fits each slot; among those sets, one of little regret.

    Exact, unless the search takes more than MAX_BRANCHES branches: then as few as were found.
    """
    fits = {slot: frozenset(fitting(found, limit)) for slot, found in regrets.items()}
    best = _greedy(fits)
    search = _Search(fits, len(best) - 1)
    while search.size > 0 and (smaller := search.run()) is not None:
        best = smaller
        search = _Search(fits, len(best) - 1)
    return sorted(_improve(best, fits, regrets))


def _greedy(fits: Mapping[Slot, frozenset[ConfigKey]]) -> list[ConfigKey]:
    left, chosen = dict(fits), []
    while left:
        counts: dict[ConfigKey, int] = {}
        for options in left.values():
            for config in options:
                counts[config] = counts.get(config, 0) + 1
        config = min(counts, key=lambda c: (-counts[c], c))
        chosen.append(config)
        left = {slot: options for slot, options in left.items() if config not in options}
    return chosen


class _Search:
    """Looks for a cover of `size` configs by branching on the slot with the fewest options."""

    def __init__(self, fits: Mapping[Slot, frozenset[ConfigKey]], size: int) -> None:
        # A slot whose options include all of another's is covered with it.
        distinct = sorted(set(fits.values()), key=lambda options: (len(options), sorted(options)))
        self.fits: list[frozenset[ConfigKey]] = []
        for options in distinct:
            if not any(other <= options for other in self.fits):
                self.fits.append(options)
        self.size = size
        self.branches = 0

    def run(self) -> list[ConfigKey] | None:
        """A cover, or None if there is none or it was not found in time."""
        return self._extend([], self.fits, self.size)

    def _extend(self, chosen: list[ConfigKey], left: list[frozenset[ConfigKey]], more: int) -> list[ConfigKey] | None:
        if not left:
            return chosen
        self.branches += 1
        if more == 0 or self.branches > MAX_BRANCHES or _disjoint(left) > more:
            return None
        fewest = min(left, key=lambda options: len(options))
        for config in sorted(fewest, key=lambda c: (-sum(c in options for options in left), c)):
            found = self._extend([*chosen, config], [options for options in left if config not in options], more - 1)
            if found is not None:
                return found
        return None


def _disjoint(slots: Sequence[frozenset[ConfigKey]]) -> int:
    """Slots of which no two share an option: each needs a config of its own."""
    seen: set[ConfigKey] = set()
    count = 0
    for options in slots:
        if seen.isdisjoint(options):
            seen |= options
            count += 1
    return count


def _improve(chosen: list[ConfigKey], fits: Mapping[Slot, frozenset[ConfigKey]], regrets: Regrets) -> list[ConfigKey]:
    """Swaps single configs for others as long as every slot stays covered and the sum of regrets falls."""

    def total(configs: Sequence[ConfigKey]) -> float:
        own = set(configs)
        if any(not options & own for options in fits.values()):
            return float("inf")
        return sum(min(regrets[slot][config] for config in options & own) for slot, options in fits.items())

    every = sorted({config for options in fits.values() for config in options})
    current, better = total(chosen), True
    while better:
        better = False
        for index in range(len(chosen)):
            for config in every:
                if config in chosen:
                    continue
                changed = [*chosen[:index], config, *chosen[index + 1 :]]
                if (value := total(changed)) < current - 1e-9:
                    chosen, current, better = changed, value, True
    return chosen


def assign(regrets: Regrets, kept: Sequence[ConfigKey] | None, limit: float) -> dict[Slot, ConfigKey]:
    """A config that fits for every slot, of those kept (None: of all): little regret and few changes along the buckets."""
    chosen: dict[Slot, ConfigKey] = {}
    change = CHANGE * limit
    for shape in sorted({slot[0] for slot in regrets}):
        slots = sorted(slot for slot in regrets if slot[0] == shape)
        # config of the last slot so far -> (cost, the configs up to it)
        paths: dict[ConfigKey, tuple[float, list[ConfigKey]]] = {}
        for slot in slots:
            options = [c for c in fitting(regrets[slot], limit) if kept is None or c in kept]
            extended: dict[ConfigKey, tuple[float, list[ConfigKey]]] = {}
            for config in sorted(options):
                before = [(cost + (change if last != config else 0.0), path) for last, (cost, path) in paths.items()]
                cost, path = min(before, key=lambda entry: entry[0], default=(0.0, []))
                extended[config] = cost + regrets[slot][config], [*path, config]
            paths = extended
        _, path = min(paths.values(), key=lambda entry: entry[0])
        chosen |= dict(zip(slots, path, strict=True))
    return chosen


def curve(regrets: Regrets) -> list[tuple[int, float, float]]:
    """(configs, worst, mean regret) as configs are added one by one, each the one that lowers the mean most, to the end."""
    best = dict.fromkeys(regrets, UNSERVED)
    left = sorted({config for found in regrets.values() for config in found})
    points: list[tuple[int, float, float]] = []
    while left and (not points or points[-1][1] > 1e-9):
        sums = {c: sum(min(best[slot], found.get(c, UNSERVED)) for slot, found in regrets.items()) for c in left}
        config = min(left, key=lambda c: (sums[c], c))
        left.remove(config)
        best = {slot: min(regret, regrets[slot].get(config, UNSERVED)) for slot, regret in best.items()}
        points.append((len(points) + 1, max(best.values()), statistics.fmean(best.values())))
    return points


# ---- the files ----


def _entries(spec: OpSpec, choices: Mapping[Slot, ConfigKey], default_backend: str) -> list[dict[str, Any]]:
    """Entries of the config file: of neighbouring buckets with one config the last one's edge serves them all."""
    entries = []
    slots = sorted(choices, key=lambda slot: (not slot[0], slot))  # the row for any size last
    for slot, following in zip(slots, [*slots[1:], None], strict=True):
        config = choices[slot]
        if following is not None and choices[following] == config and _serves_too(spec, following, slot):
            continue
        sizes = {**dict(slot[0]), **spec.ladders.edges(slot[1])}
        entry: dict[str, Any] = {"key": {name: sizes[symbol] for name, symbol in spec.config_key.items() if symbol in sizes}}
        if config.backend != default_backend:
            entry["backend"] = config.backend
        entries.append({**entry, "config": json.loads(config.config)})
    return entries


def _serves_too(spec: OpSpec, following: Slot, slot: Slot) -> bool:
    """Whether what a file has for the next bucket serves this one: of two ladders an M has entries of its own."""
    if following[0] != slot[0]:
        return False
    return spec.second is None or spec.ladders.split(following[1])[0] == spec.ladders.split(slot[1])[0]


def _text(entries: Sequence[Mapping[str, Any]]) -> str:
    """One entry per line."""
    lines = [json.dumps(entry, ensure_ascii=False) for entry in entries]
    return "[\n" + ",\n".join(f"  {line}" for line in lines) + "\n]\n"


def _companion(
    spec: OpSpec,
    timings: Sequence[Timing],
    measured: Measured,
    chosen: Mapping[Slot, Choice],
    report: OpReport,
    limit: float,
) -> dict[str, Any]:
    """What measured the configs, and what it found: times in µs per launch, `backends` being the best of each."""
    versions = {json.dumps(timing["versions"], sort_keys=True) for timing in timings}
    names = {symbol: name for name, symbol in spec.config_key.items()}
    return {
        "op": spec.name,
        "gpu": timings[0]["gpu"],
        "variants": sorted({timing["variant"] for timing in timings}),
        "regret": {"limit": limit, "worst": round(report.worst, 4), "mean": round(report.mean, 4)},
        "configs": {"candidates": report.candidates, "best_everywhere": report.before, "kept": report.kept},
        "seconds": {"compile": round(report.compile_seconds, 1), "device": round(report.device_seconds, 1)},
        "measured": {"from": min(t["time"] for t in timings), "to": max(t["time"] for t in timings)},
        "versions": [json.loads(text) for text in sorted(versions)],
        "times": [
            {
                "key": {names.get(symbol, symbol): size for symbol, size in (*shape, *spec.ladders.edges(bucket).items())},
                "backend": choice.config.backend,
                "config": json.loads(choice.config.config),
                "us": round(choice.us, 3),
                "best_us": round(choice.best_us, 3),
                "regret": round(choice.regret, 4),
                "backends": {name: round(us, 3) for name, us in measured.by_backend((shape, bucket)).items()},
            }
            for (shape, bucket), choice in sorted(chosen.items())
        ],
    }
