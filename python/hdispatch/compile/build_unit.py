"""Units of work of a build, and the buckets and classes of M that they serve."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any, TypedDict

from ..errors import BuildError
from ..ladders import Ladders
from ..manifest import MClass, Record, class_of
from ..opspec import OpSpec, Variant

#: M that a host function is traced with first.
HINT = 64

#: The last bucket of a ladder has no upper end, but a record has: it must reach at least this M, or second integer.
OPEN_BUCKET_M = 2**15


def common_m(spec: OpSpec) -> int:
    """The M of a trace for several buckets: none that the op leaves to its fallback, as a host function may refuse it."""
    return min(HINT, spec.ladder[-1]) if spec.is_closed else HINT


@dataclass(frozen=True)
class Unit:
    """The source of records: one config for some buckets of a variant and shape. Plain data.

    package   dotted name of the package with the op's spec.py and `<backend>.py`
    shape     the sizes that are compiled in
    buckets   the op's, as `OpSpec.ladders` numbers them
    rows      which rows the records serve: (shape of the row, bucket)
    """

    package: str
    backend: str
    variant: str
    shape: dict[str, int]
    config: dict[str, Any]
    buckets: tuple[int, ...]
    rows: tuple[tuple[tuple[tuple[str, int], ...], int], ...] = ()

    @property
    def label(self) -> str:
        """For progress and messages: `op bfloat16 K=4096 buckets 0-13`."""
        shape = " ".join(f"{name}={size}" for name, size in self.shape.items())
        first, last = self.buckets[0], self.buckets[-1]
        contiguous = len(self.buckets) > 1 and self.buckets == tuple(range(first, last + 1))
        buckets = f"{first}-{last}" if contiguous else ",".join(map(str, self.buckets))
        return f"{self.package.rpartition('.')[2]} {self.variant} {shape or 'any size'} buckets {buckets}"

    def to_json(self) -> dict[str, Any]:
        """As plain data; `Unit.from_json` reads it back."""
        return asdict(self) | {"buckets": list(self.buckets)}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Unit:
        """Reads `to_json`."""
        rows = tuple((tuple((name, size) for name, size in shape), bucket) for shape, bucket in data["rows"])
        return Unit(**{**data, "buckets": tuple(data["buckets"]), "rows": rows})


class Built(TypedDict):
    """A record, the buckets that it serves, and the seconds that it took. `file` of a cubin is the SHA-256 of its bytes."""

    record: Record
    buckets: list[int]
    seconds: float


class BuiltEntry(TypedDict):
    """The build cache's entry for a unit: all of its records."""

    built: list[Built]


class RefusedEntry(TypedDict):
    """The build cache's entry for a unit that cannot be built: the reason."""

    problem: str


def load_spec(package: str) -> OpSpec:
    """`SPEC` of `<package>/spec.py`. BuildError if there is none."""
    module = importlib.import_module(f"{package}.spec")
    spec = getattr(module, "SPEC", None)
    if not isinstance(spec, OpSpec):
        raise BuildError(f"{module.__name__} has no OpSpec named SPEC")
    return spec


def allocates(host: Callable[..., object], spec: OpSpec) -> bool:
    """Whether a host function, or a kernel that a DSL makes one of, allocates what the op returns: it does not take it.

    BuildError for one that takes some of it.
    """
    taken = [arg.name for arg in spec.returned if arg.name in inspect.signature(host).parameters]
    if taken and len(taken) != len(spec.returned):
        raise BuildError(f"{spec.name}: the host function takes {taken} of {[arg.name for arg in spec.returned]}; all or none")
    return bool(spec.returned) and not taken


def early_reads(module: ModuleType, spec: OpSpec, variant: Variant) -> tuple[str, ...]:
    """The tensors of a kernel module's EARLY_READS that the variant has: its code may read them before it waits."""
    given = getattr(module, "EARLY_READS", ())
    tensors = [arg.name for arg in spec.tensors()]
    if not isinstance(given, tuple) or set(given) - set(tensors):
        raise BuildError(
            f"{module.__name__}: EARLY_READS is {given!r}; it takes a tuple of tensor arguments of {spec.name}: {tensors}"
        )
    return tuple(name for name in given if name not in variant.none)


def serves(m_min: int, m_max: int, ladders: Ladders, bucket: int, closed: bool = False) -> bool:
    """Whether m_min..m_max holds every M of a bucket. The open bucket counts up to OPEN_BUCKET_M, and past its edge.

    `closed`: the last bucket is not open, it ends at its edge.
    """
    first, last = ladders.bounds(bucket)
    if closed and last is None:
        last = ladders.m[-1]
    return m_min <= first and m_max >= (last or max(OPEN_BUCKET_M, ladders.m[-1] + 1))


def serves_second(low: int, high: int, ladders: Ladders, bucket: int) -> bool:
    """Whether low..high holds every value of the second ladder's integer in a bucket, likewise."""
    first, last = ladders.second_bounds(bucket)
    return low <= first and high >= (last or max(OPEN_BUCKET_M, ladders.second[-1] + 1))


def classes_of(first: int, last: int) -> set[MClass]:
    """The classes that occur in first..last."""
    return {class_of(m) for m in range(first, min(last, first + 33) + 1)}
