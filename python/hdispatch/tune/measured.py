"""An op's timings by slot: what the configs cost where they compete, and by how much each is slower than the best there.

An op's *slots* are what its config file has keys for: a shape and a bucket. In a slot, a config's *regret* is how much
slower it is than the best config measured there (the worst over variants, and over sizes that the key does not tell apart).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ..opspec import KEY_SYMBOLS, OpSpec
from .cover import Regrets, Shape, Slot, assign
from .timings import BROKE, ConfigKey, Timing, config_key

#: Further times of a candidate, besides `us`.
WAYS: tuple[Literal["stream_us", "warm_us"], ...] = ("stream_us", "warm_us")


#: The config that a slot was served by until now, None for none.
Previous = Callable[[Slot], ConfigKey | None]


@dataclass(frozen=True)
class Choice:
    """The config of a slot: µs (the slowest variant's), the best config's µs there, and the regret."""

    config: ConfigKey
    us: float
    best_us: float
    regret: float


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
        self.quartiles = {slot: {cell: _quartiles(found) for cell, found in cells.items()} for slot, cells in lines.items()}
        self.times = {slot: {cell: _weighed(found) for cell, found in cells.items()} for slot, cells in lines.items()}
        self.regrets: Regrets = {slot: found for slot, cells in self.times.items() if (found := _regrets(cells.values()))}

    def _shape(self, timing: Timing) -> Shape:
        """The sizes that the file's key has: all that rows name; or, for sizes tried on behalf of an open row, that row's."""
        sizes = {"K": timing["K"], "N": timing["N"]}
        named = _named(self.spec)
        exact = {symbol: size for symbol, size in sizes.items() if symbol in named}
        rows = [row for row in self.spec.shapes if row.items() <= sizes.items()]
        row = max(rows, key=len, default=sizes)
        fuller = [other for other in self.spec.shapes if row.items() < other.items()]
        if fuller and not self._hinted(timing, sizes, row):  # a model's sizes, which no row names
            row = max(fuller, key=len)
        return tuple(sorted((symbol, size) for symbol, size in exact.items() if symbol in row))

    def _hinted(self, timing: Timing, sizes: Mapping[str, int], row: Mapping[str, int]) -> bool:
        """Whether the sizes that a row leaves open are those that stand for all of them."""
        spec = self.spec
        measured = spec.measured(spec.variant(timing["variant"])) if spec.measured else {}
        open_sizes = [symbol for symbol in KEY_SYMBOLS[1:] if symbol in spec.symbols() and symbol not in row]
        return all(sizes[symbol] == measured.get(symbol, spec.hint(symbol)) for symbol in open_sizes)

    def variants(self, slot: Slot) -> list[str]:
        """The variants that were measured in a slot."""
        return sorted({variant for variant, _, _ in self.times[slot]})

    def choice(self, slot: Slot, config: ConfigKey, variant: str | None = None) -> Choice:
        """A config in a slot, as measured; of one variant alone if it is named."""
        cells = self._cells(slot, variant)
        us = max(cell[config] for cell in cells)
        return Choice(config, us, max(min(cell.values()) for cell in cells), _regrets(cells)[config])

    def _cells(self, slot: Slot, variant: str | None) -> list[dict[ConfigKey, float]]:
        return [found for cell, found in self.times[slot].items() if variant in (None, cell[0])]

    def keep(self, choices: Mapping[Slot, ConfigKey], previous: Previous, limit: float) -> dict[Slot, ConfigKey]:
        """The choices, and the previous config where it is allowed and slower than the choice by no more than the noise."""
        return {slot: self._kept(slot, config, previous(slot), limit) for slot, config in choices.items()}

    def _kept(self, slot: Slot, config: ConfigKey, before: ConfigKey | None, limit: float) -> ConfigKey:
        regrets = self.regrets[slot]
        if before is None or before not in regrets or regrets[before] > max(limit, regrets[config]):
            return config
        return before if regrets[before] - regrets[config] <= self.noise(slot, before, config) else config

    def noise(self, slot: Slot, *configs: ConfigKey) -> float:
        """The widest range between the quartiles of configs in a slot, over their median."""
        return max(cell[config] for cell in self.quartiles[slot].values() for config in configs)

    def by_backend(self, slot: Slot, variant: str | None = None) -> dict[str, float]:
        """The best µs of each backend in a slot; of one variant alone if it is named."""
        cells = self._cells(slot, variant)
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


def _quartiles(found: Mapping[ConfigKey, Timing]) -> dict[ConfigKey, float]:
    """Of a cell's candidates the range between the quartiles, over the median; 0 of an estimate."""
    return {config: (timing.get("q3", 0.0) - timing.get("q1", 0.0)) / timing["us"] for config, timing in found.items()}


def _named(spec: OpSpec) -> list[str]:
    """The sizes besides M that the op's config keys name."""
    return [symbol for symbol in KEY_SYMBOLS[1:] if symbol in spec.config_key.values()]


def _regrets(cells: Iterable[Mapping[ConfigKey, float]]) -> dict[ConfigKey, float]:
    """The worst regret of each config that was measured in all cells of a slot."""
    cells = list(cells)
    common = set.intersection(*(set(cell) for cell in cells)) if cells else set()
    return {config: max(cell[config] / min(cell.values()) - 1 for cell in cells) for config in sorted(common)}
