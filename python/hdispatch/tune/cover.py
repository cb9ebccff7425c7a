"""Which configs to keep, so that a nearly best one is there in every slot, and which of them serves where.

A config *fits* a slot if its regret is within the limit; where none is, the one with the least regret fits.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from .timings import ConfigKey

#: A change of config between neighbouring buckets must gain this share of the limit: fewer edges are easier to read.
CHANGE = 0.25
#: The regret that drawing takes for a slot that no config of a set was measured in.
UNSERVED = 1.0
#: Sizes of a key as sorted items, without M: (("K", 4096),); and a bucket.
Shape = tuple[tuple[str, int], ...]
Slot = tuple[Shape, int]
Regrets = Mapping[Slot, Mapping[ConfigKey, float]]


def fitting(found: Mapping[ConfigKey, float], limit: float) -> list[ConfigKey]:
    """The configs that fit a slot."""
    least = min(found.values())
    return [config for config, regret in found.items() if regret <= max(limit, least)]


def cover(regrets: Regrets, limit: float) -> list[ConfigKey]:
    """Few configs such that one fits each slot: greedily the one that fits most slots left, then swapped for less regret."""
    fits = {slot: frozenset(fitting(found, limit)) for slot, found in regrets.items()}
    left, chosen = dict(fits), []
    while left:
        counts: dict[ConfigKey, int] = {}
        for options in left.values():
            for config in options:
                counts[config] = counts.get(config, 0) + 1
        config = min(counts, key=lambda c: (-counts[c], c))
        chosen.append(config)
        left = {slot: options for slot, options in left.items() if config not in options}
    return sorted(_improve(chosen, fits, regrets))


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
