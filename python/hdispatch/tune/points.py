"""Where configs are measured: the points of an op, each a variant, sizes and a bucket of M."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..compile.op_package import OpPackage
from ..opspec import OpSpec


@dataclass(frozen=True)
class Scope:
    """Which candidates are collected.

    variants          of an op; its typical one if None: a config is chosen for all variants alike
    shapes, buckets   of an op; all if None
    backends          whose candidate lists are measured; None: those that the op's config files chose, see `Chosen`.
                      Existing configs of all backends are measured too
    whole             all backends' lists are measured, and whole
    calls             variants with sizes of an op, instead of `variants` and `shapes`; its rows need not name the sizes
    more              folders with <op>/*.json in vLLM's format, e.g. vLLM's own or what `tune helion` wrote
    radius            how far Helion's seeds are varied: steps along each of its fragments; -1: nothing from Helion
    spread            the options of a bucket are tried in so many buckets to either side; None: 1, see `spread_of`
    """

    variants: Callable[[OpSpec], Iterable[str]] | None = None
    shapes: Callable[[OpSpec], Iterable[dict[str, int]]] | None = None
    buckets: Callable[[OpSpec], Iterable[int]] | None = None
    more: tuple[Path, ...] = ()
    radius: int = 1
    spread: int | None = None
    calls: Callable[[OpSpec], Iterable[tuple[str, dict[str, int]]]] | None = None
    backends: tuple[str, ...] | None = None
    whole: bool = False

    def spread_of(self, spec: OpSpec) -> int:
        """Buckets to either side. Of two ladders a bucket has eight beside it, whose options are seldom better than its own."""
        if self.spread is not None:
            return self.spread
        return 1 if self.whole or spec.second is None else 0


@dataclass(frozen=True)
class Point:
    """The rows of a shape in a bucket, for which configs compete. `row` has their sizes; one that it leaves out is open."""

    op: OpPackage
    variant: str
    row: tuple[tuple[str, int], ...]
    bucket: int


def points_of(package: OpPackage, scope: Scope, *, measured: bool = True) -> list[Point]:
    """The points of an op that are measured; or those that are not, because others have the same sizes and more."""
    spec = package.spec
    buckets = list(scope.buckets(spec)) if scope.buckets else list(range(spec.ladders.count))
    found = []
    for variant, rows in _rows(spec, scope).items():
        chosen = [row for row in rows if any(row.items() < other.items() for other in rows) != measured]
        found += [Point(package, variant, _items(row), bucket) for row in chosen for bucket in buckets]
    return found


def _rows(spec: OpSpec, scope: Scope) -> dict[str, list[dict[str, int]]]:
    """The sizes of rows, by variant."""
    if scope.calls is not None:
        calls = list(scope.calls(spec))
        return {variant: [row for named, row in calls if named == variant] for variant, _ in calls}
    variants = list(scope.variants(spec)) if scope.variants else [spec.typical_variant().name]
    rows = list(scope.shapes(spec)) if scope.shapes else list(spec.shapes)
    return dict.fromkeys(variants, rows)


def sizes_of(point: Point) -> dict[str, int]:
    """All sizes to measure a point at, the buckets' edges included: open ones as the spec says."""
    spec = point.op.spec
    hinted = {symbol: spec.hint(symbol) for symbol in spec.symbols() if symbol != "M"}
    measured = spec.measured(spec.variant(point.variant)) if spec.measured else {}
    return {**hinted, **measured, **dict(point.row), **spec.ladders.edges(point.bucket)}


def _items(sizes: Mapping[str, int]) -> tuple[tuple[str, int], ...]:
    return tuple(sorted(sizes.items()))
