"""Compiling candidates: as a build does, but a unit that fails, hangs or kills its worker is reported and left out."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from ..compile import builder, op_package
from ..compile.build_unit import Built, RefusedEntry, Unit
from ..compile.pool import Pool, WorkerLost, checked_jobs
from ..compile.store import Store
from ..compile.target import GpuTarget
from ..compile.versions import tool_versions
from ..errors import BuildError

#: A compilation that takes longer has gone wrong.
COMPILE_SECONDS = 600.0


@dataclass
class Made:
    """The result of a unit: its records as `record_builder` gives them, or the problem; whether the cache had it."""

    built: list[Built] = field(default_factory=list)
    problem: str = ""
    cached: bool = False
    tools: dict[str, str] = field(default_factory=dict)


class Compilers(Protocol):
    """Where units are compiled, if not by processes of this host."""

    def pool(self, target: GpuTarget, store: Store, sources: Mapping[str, Mapping[str, str]]) -> Pool:
        """What compiles for a target. `sources`: by package, what each node's hdispatch must be made of."""

    def jobs(self) -> int:
        """How many units at once."""


def compile_many(
    units: Sequence[Unit],
    own: Sequence[Collection[int]],
    target: GpuTarget,
    store: Store,
    jobs: int | None = None,
    compilers: Compilers | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> list[Made]:
    """The result of each unit. The store gives the results of earlier runs, failures included, and keeps the new ones.

    own        of each unit the buckets that it is meant for; one that cannot serve all of its buckets is made for those alone
    jobs       units at once; one per CPU if None
    compilers  where they are compiled; by processes of this host if None

    BuildError if `jobs` is less than 1.
    """
    count = checked_jobs(jobs if compilers is None else jobs or compilers.jobs())
    tools = {backend: tool_versions(backend, target) for backend in {unit.backend for unit in units}}
    sources = op_package.sources({unit.package for unit in units})

    def make(workers: Pool, unit: Unit) -> Made:
        """From the cache or a worker; without records where it is refused, now or in an earlier run."""
        versions = tools[unit.backend]
        key = builder.record_key(unit, sources[unit.package], target, versions)
        if (found := builder.find_built(unit, key, store)) is not None:
            return Made(found, cached=True, tools=versions)
        if (refused := store.get("refused", key, RefusedEntry)) is not None:
            return Made(problem=refused["problem"], tools=versions)
        try:
            built = workers.build(unit, versions, COMPILE_SECONDS)
        except WorkerLost:
            raise
        except BuildError as error:
            store.put("refused", key, {"problem": str(error)})
            return Made(problem=str(error), tools=versions)
        store.put("record", key, {"built": built})
        return Made(built, tools=versions)

    def make_or_part(workers: Pool, index: int) -> Made:
        unit, mine = units[index], tuple(sorted(own[index]))
        try:
            whole = make(workers, unit)
            if whole.built or mine in ((), unit.buckets):
                return whole
            return make(workers, replace(unit, buckets=mine))  # its problem is the config's, not the other buckets'
        except WorkerLost as error:  # of memory or time: another run may have more
            return Made(problem=str(error), tools=tools[unit.backend])

    # Neighbours in the list often share code, which processes that compile them at once would each make; and mixed they say
    # what those to come take.
    order = list(range(len(units)))
    random.Random(0).shuffle(order)
    made: list[Made] = [Made() for _ in units]
    with Pool(target, store.root) if compilers is None else compilers.pool(target, store, sources) as workers:
        results = workers.map(lambda place: make_or_part(workers, order[place]), len(units), count)
        for done, (place, result) in enumerate(results, 1):
            made[order[place]] = result
            if progress:
                progress(done, len(units), units[order[place]].label)
    return made
