"""From timings to config files: few configs of an op that are nearly the best everywhere, and where each is used."""

from __future__ import annotations

import functools
import itertools
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..compile import configs
from ..compile.measurements import companion
from ..compile.op_package import OpPackage
from ..compile.store import write_atomic
from ..compile.target import short_name
from ..compile.versions import OPTIONAL
from ..errors import BuildError
from ..opspec import KEY_SYMBOLS, OpSpec
from .cover import Slot, assign, cover, curve
from .measured import Choice, Measured, Previous
from .timings import ConfigKey, Refusal, Timing, canonical, cell_key, config_key, fault, unlike_cards


@dataclass
class OpReport:
    """The selection for an op.

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
    packages: Mapping[str, OpPackage],
    out: Path | None = None,
    *,
    limit: float = 0.02,
    write: bool = True,
) -> list[OpReport]:
    """Select for every op that has timings, and write `<folder>/nvidia_<gpu>.json` and `….tuned.json`.

    packages   the ops by name
    out        the folder is `<out>/<op>`; None: the op's own folder of configs
    limit      the regret that is allowed, 0.02 being 2 %

    Entries of a file for sizes, or for edges of M, that the timings do not have are kept; a file that is not there yet begins
    from the one that served the card until now, which may be another card's. Timings of variants whose compiled-in values, or
    absent tensors, are not the typical variant's make entries for those alone, beside the others. Where configs of an
    optional backend were chosen, the best without it are written too. BuildError for timings of several GPUs, or of an op,
    variant, backend, bucket or size that there is not, for an op without one right candidate, or a limit that is negative.

    A config that the file has for a slot stays where the limit allows it and it is slower than the best choice by no more than
    the noise, the range between the quartiles of the two: so runs that differ by noise alone choose alike.
    """
    if not 0 <= limit < math.inf:
        raise BuildError(f"the regret is {limit}; it takes 0 or more, 0.02 being 2 %")
    if not timings:
        raise BuildError("there are no timings; make some with `hdispatch tune measure`")
    gpus = sorted({timing["gpu"] for timing in timings})
    if len(gpus) > 1:
        raise BuildError(f"the timings are of {gpus}; select for one GPU at a time")
    if cards := unlike_cards(timings):
        raise BuildError(f"the timings are of unlike cards, {' and '.join(cards)}; select for one at a time")
    refused = refusal(packages)
    for timing in timings:
        if (why := fault(timing) or refused(timing)) is not None:
            raise BuildError(f"a timing of {cell_key(timing)} cannot be chosen by: {why}")
    reports = []
    for op in sorted({timing["op"] for timing in timings}):
        own = [timing for timing in timings if timing["op"] == op]
        package = packages[op]
        path = (out / op if out else package.configs) / f"nvidia_{short_name(gpus[0])}.json"
        began = None if path.exists() else _served_until_now(package, path.name)
        notes = [f"{path} is new: what was not measured is as in {began.path}, which served it until now"] if began else []
        for arguments in sorted({_arguments(package.spec, timing["variant"]) for timing in own}):
            group = [timing for timing in own if _arguments(package.spec, timing["variant"]) == arguments]
            reports.append(_select_op(package, group, path, began, limit, write, dict(arguments)))
            reports[-1].notes[:0] = notes
            notes = []
    return reports


def _served_until_now(package: OpPackage, name: str) -> configs.ConfigFile | None:
    """The file of the op's own configs that a build takes for the card of a file's name; None if there is none."""
    found = configs.find_file([package.configs], name)
    return configs.read(found, package.spec) if found else None


def _arguments(spec: OpSpec, variant: str) -> tuple[tuple[str, int], ...]:
    """What a key says of a variant: the arguments that are not as the typical one has them."""
    this, usual = spec.variant(variant), spec.typical_variant()
    values = [(name, configs.argument_of(this, name)) for name in configs.key_arguments(spec)]
    return tuple((name, value) for name, value in values if value is not None and value != configs.argument_of(usual, name))


def refusal(packages: Mapping[str, OpPackage]) -> Refusal:
    """Refuses a line of an op, variant, backend, bucket or size that there is not: for `timings.read`, which names lines."""
    variants = functools.cache(lambda op: [variant.name for variant in packages[op].spec.variants()])

    def refused(timing: Timing) -> str | None:
        op = timing["op"]
        if op not in packages:
            return f"it is of {op!r}, which is no op here; there are {sorted(packages)}"
        has = {"variant": (timing["variant"], variants(op)), "backend": (timing["backend"], list(packages[op].backends))}
        for name, (value, there) in has.items():
            if value not in there:
                return f"{name} is {value!r}; {op} has {there}"
        return _refused_sizes(packages[op].spec, timing)

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
    package: OpPackage,
    timings: Sequence[Timing],
    path: Path,
    began: configs.ConfigFile | None,
    limit: float,
    write: bool,
    arguments: dict[str, int],
) -> OpReport:
    """`began`: the file that a new one begins from, whose configs no choice is kept for: they were chosen elsewhere."""
    spec, default_backend = package.spec, package.backends[0]
    measured = Measured(spec, timings)
    if not measured.regrets:
        raise BuildError(f"{spec.name}: no candidate gave a right result; see the timings' lines with status wrong or refused")
    present = configs.read(path, spec) if path.exists() else began or configs.ConfigFile(path, ())
    variant = timings[0]["variant"]
    previous = _previous(present, spec, variant, default_backend)
    choices, open_choices, notes = _assigned(measured, limit, previous if began is None else _nothing)
    chosen = {slot: measured.choice(slot, config) for slot, config in choices.items()}
    every = _with_unmeasured(spec, {**choices, **open_choices}, _right(previous, measured))
    entries = _entries(spec, every, default_backend)
    for backend in OPTIONAL:
        before = _right(_previous(present, spec, variant, default_backend, without=backend), measured)
        keep = before if began is None else _nothing
        entries += _stand_ins(spec, timings, every, default_backend, backend, limit, before, keep)
    for entry in entries:
        entry["key"] |= arguments
    shapes = [
        {spec.config_key[k]: v for k, v in e["key"].items() if spec.config_key.get(k) in KEY_SYMBOLS[1:]} for e in entries
    ]
    # The default is the row for any size.
    replaced = [e for e in present.entries if e.shape in shapes and e.arguments == arguments]
    others = [entry.raw for entry in present.entries if entry not in replaced]
    if others:
        notes.append(f"{len(others)} entries for sizes or arguments without timings are kept as they were")
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
        # In the place of those that they replace: of equally near sizes the earlier entry serves.
        place = next((at for at, entry in enumerate(present.entries) if entry in replaced), len(present.entries))
        write_atomic(path, _text([*others[:place], *entries, *others[place:]]).encode())
        found = _companion(spec, timings, measured, chosen, report, limit)
        # Times of another card are none of this one's.
        same_card = began is not None and began.path.name == path.name and not companion(path).exists()
        found = _beside(spec, found, companion(began.path if began is not None and same_card else path), arguments)
        write_atomic(companion(path), (json.dumps(found, indent=1, ensure_ascii=False) + "\n").encode())
    return report


def _right(previous: Previous, measured: Measured) -> Previous:
    """What served a slot, if no timing says that its results are wrong."""

    def serves(slot: Slot) -> ConfigKey | None:
        config = previous(slot)
        return None if config in measured.wrong else config

    return serves


def _with_unmeasured(spec: OpSpec, choices: Mapping[Slot, ConfigKey], previous: Previous) -> dict[Slot, ConfigKey]:
    """Choices, and what served the other buckets of their shapes: a run may measure a part, and an entry serves several."""
    slots = ((shape, bucket) for shape in {shape for shape, _ in choices} for bucket in range(spec.ladders.count))
    kept = {slot: config for slot in slots if slot not in choices and (config := previous(slot)) is not None}
    return {**choices, **kept}


def _assigned(
    measured: Measured, limit: float, previous: Previous
) -> tuple[dict[Slot, ConfigKey], dict[Slot, ConfigKey], list[str]]:
    """The configs of the slots, those of the rows that leave sizes open, and notes about the latter."""
    kept = cover(measured.regrets, limit)
    chosen = measured.keep(assign(measured.regrets, kept, limit), previous, limit)
    return chosen, *measured.open_rows(sorted(set(chosen.values())), limit)


def _nothing(_slot: Slot) -> ConfigKey | None:
    """The `Previous` of a file that keeps no choice."""
    return None


def _previous(
    present: configs.ConfigFile, spec: OpSpec, variant: str, default_backend: str, without: str | None = None
) -> Previous:
    """What a file serves a slot with; `without`: where that backend is not installed."""
    backends = {entry.backend or default_backend for entry in present.entries} - {without}
    file = present.available(backends, default_backend)

    def serves(slot: Slot) -> ConfigKey | None:
        if not file.entries:
            return None
        entry = file.pick(spec, dict(slot[0]), spec.ladders.edges(slot[1]), spec.variant(variant))
        backend = entry.backend or default_backend
        return ConfigKey(backend, canonical(entry.config)) if backend != without else None

    return serves


def _stand_ins(
    spec: OpSpec,
    timings: Sequence[Timing],
    choices: Mapping[Slot, ConfigKey],
    default_backend: str,
    absent: str,
    limit: float,
    previous: Previous,
    keep: Previous,
) -> list[dict[str, Any]]:
    """Entries for the sizes that have configs of a backend, made without it: for where it is not installed."""
    shapes = {slot[0] for slot, config in choices.items() if config.backend == absent}
    if not shapes:
        return []
    measured = Measured(spec, [timing for timing in timings if timing["backend"] != absent])
    others, open_others, _ = _assigned(measured, limit, keep) if measured.regrets else ({}, {}, [])
    slots = [slot for slot in choices if slot[0] in shapes]
    found = {slot: config for slot, config in {**others, **open_others}.items() if slot[0] in shapes}
    found |= {slot: config for slot in slots if slot not in found and (config := previous(slot)) is not None}
    return [{"key": e.pop("key"), "without": absent, **e} for e in _entries(spec, found, default_backend)]


def _compile_seconds(timings: Sequence[Timing]) -> float:
    """Seconds of compiling, each code counted once."""
    return sum({tuple(timing["artifacts"]): timing["compile_seconds"] for timing in timings}.values())


# ---- the files ----


def _entries(spec: OpSpec, choices: Mapping[Slot, ConfigKey], default_backend: str) -> list[dict[str, Any]]:
    """Entries of the config file: of neighbouring buckets with one config the last one's edge serves them all."""
    entries = []
    slots = sorted(choices, key=lambda slot: (not slot[0], slot))  # the row for any size last
    for slot, following in itertools.zip_longest(slots, slots[1:]):
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
    """Whether a file's entry for the next bucket serves this one too. With two ladders each M has its own entries."""
    if following[0] != slot[0]:
        return False
    return spec.second is None or spec.ladders.split(following[1])[0] == spec.ladders.split(slot[1])[0]


def _text(entries: Sequence[Mapping[str, Any]]) -> str:
    """One entry per line."""
    lines = [json.dumps(entry, ensure_ascii=False) for entry in entries]
    return "[\n" + ",\n".join(f"  {line}" for line in lines) + "\n]\n"


def _beside(spec: OpSpec, found: dict[str, Any], path: Path, arguments: Mapping[str, int]) -> dict[str, Any]:
    """A new companion with the times for other buckets and values of compiled-in arguments that the present one has.

    What else it says is of the typical variant's timings, where there are some.
    """
    times = [{**time, "key": time["key"] | arguments} for time in found["times"]]
    if not path.is_file():
        return {**found, "times": times}
    present: dict[str, Any] = json.loads(path.read_bytes())
    there = [spec.ladders.edges(bucket) for bucket in range(spec.ladders.count)]
    ladders = {name: symbol for name, symbol in spec.config_key.items() if symbol in there[0]}
    measured = [(time["key"], time.get("variant")) for time in times]
    keys = [key for key, _ in measured]
    kept = [
        time
        for time in (_with_variant(spec, each, present["variants"]) for each in present["times"])
        if (time["key"], time.get("variant")) not in measured
        and ("variant" in time or time["key"] not in keys)
        and {symbol: time["key"].get(name) for name, symbol in ladders.items()} in there
    ]
    if not kept:
        return {**found, "times": times}
    variants = sorted({*present["variants"], *found["variants"]})
    return {**(present if arguments else found), "variants": variants, "times": [*kept, *times]}


def _with_variant(spec: OpSpec, time: dict[str, Any], variants: Sequence[str]) -> dict[str, Any]:
    """A time of a companion with its variant; one of an older file, which names none, is left so if it may be several's."""
    names = [arg for arg in configs.key_arguments(spec) if arg in time["key"]]
    said = tuple((name, time["key"][name]) for name in names)
    there = {variant.name for variant in spec.variants()}
    of = [variant for variant in variants if variant in there and _arguments(spec, variant) == said]
    if "variant" in time or len(there) == 1 or len(of) != 1:
        return time
    return _time_of(of[0], time)


def _time_of(variant: str, time: dict[str, Any]) -> dict[str, Any]:
    """A time with its variant behind its key."""
    return {"key": time["key"], "variant": variant, **{name: value for name, value in time.items() if name != "key"}}


def _times(spec: OpSpec, measured: Measured, chosen: Mapping[Slot, Choice]) -> list[dict[str, Any]]:
    """The chosen configs' µs per launch, `backends` being the best of each; of each variant, where the op has several."""
    names = {symbol: name for name, symbol in spec.config_key.items()}
    has_one = len(spec.variants()) == 1
    found = []
    for (shape, bucket), each in sorted(chosen.items()):
        slot = shape, bucket
        for variant in measured.variants(slot):
            choice = measured.choice(slot, each.config, variant)
            time = {
                "key": {names.get(symbol, symbol): size for symbol, size in (*shape, *spec.ladders.edges(bucket).items())},
                "backend": choice.config.backend,
                "config": json.loads(choice.config.config),
                "us": round(choice.us, 3),
                "best_us": round(choice.best_us, 3),
                "regret": round(choice.regret, 4),
                "backends": {name: round(us, 3) for name, us in measured.by_backend(slot, variant).items()},
            }
            found.append(time if has_one else _time_of(variant, time))
    return found


def _companion(
    spec: OpSpec,
    timings: Sequence[Timing],
    measured: Measured,
    chosen: Mapping[Slot, Choice],
    report: OpReport,
    limit: float,
) -> dict[str, Any]:
    """Where the configs were measured, and their times."""
    versions = {json.dumps(timing["versions"], sort_keys=True) for timing in timings}
    return {
        "op": spec.name,
        "gpu": timings[0]["gpu"],
        "variants": sorted({timing["variant"] for timing in timings}),
        "regret": {"limit": limit, "worst": round(report.worst, 4), "mean": round(report.mean, 4)},
        "configs": {"candidates": report.candidates, "best_everywhere": report.before, "kept": report.kept},
        "seconds": {"compile": round(report.compile_seconds, 1), "device": round(report.device_seconds, 1)},
        "measured": {"from": min(t["time"] for t in timings), "to": max(t["time"] for t in timings)},
        "versions": [json.loads(text) for text in sorted(versions)],
        "times": _times(spec, measured, chosen),
    }
