"""From a unit of work (an op's variant, shape and config) to launch records: trace, bound, compile, write down.

A record must be right for every call that it lets through. Three things make it so: the launch is symbolic in M and the
row strides; the Ms are those for which the DSL itself agrees (`HostSide.agrees`), the assumptions of the trace hold and
every value fits its type; and at chosen Ms the host function is run again with everything known, and must launch the same.
"""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from types import ModuleType
from typing import NamedTuple

import sympy  # type: ignore[import-untyped]

from ..errors import BuildError
from ..manifest import M_CLASSES, Cubin, CubinRecord, Expr, Guard, MClass, Param, Record
from ..opspec import OpSpec
from . import triton_backend
from .build_unit import HINT, OPEN_BUCKET_M, Built, Unit, classes_of, common_m, load_spec, serves, serves_second
from .call_maker import FLOAT_HINT, ROW_PADDING, CallMaker
from .expr import OPERATORS, evaluate, guards_of, postfix, render, turns
from .host_launch import ALIGNMENT, Descriptor, Flag, Launch, Number, Pointer, Real
from .store import Store
from .target import GpuTarget
from .trace import HostSide, Trace, trace
from .triton_backend import Code, MapCode

INT32_MAX = 2**31 - 1
MAX_GRID = (INT32_MAX, 65535, 65535)

#: By the width of a kernel's offsets; with 64 bits, what torch can address in bytes.
MAX_ELEMENTS = {32: INT32_MAX, 64: 2**59}

#: Ms at which a record is checked by a concrete run, besides those where the code might turn: around the classes' borders.
_CHECKED_MS = (1, 2, 3, 15, 16, 17, 48, 127, 1000, 4096, 8192)
_CHECKED_PADDINGS = (0, 3 * ALIGNMENT, 4096)


def build_records(unit: Unit, target: GpuTarget, tools: Mapping[str, str], store: Store) -> list[Built]:
    """The records of a unit, their cubins in the store: one, or more where the code depends on M's magnitude.

    BuildError, naming the construct and the reason, for what cannot become a record.
    """
    backend = importlib.import_module(f"{__package__}.{unit.backend}_backend")
    if not hasattr(backend, "host_side"):  # it has no host function to trace
        records: list[Built] = backend.build_records(unit, target, tools, store)
        return records
    spec = load_spec(unit.package)
    remaining = list(unit.buckets)
    built: list[Built] = []
    for hint in _hints(spec, unit.buckets):
        if not _may_serve(spec, hint, remaining):
            continue
        start = time.monotonic()
        candidate = Candidate(unit, spec, backend, hint.m, hint.second)
        served = [bucket for bucket in remaining if candidate.serves(bucket)]
        remaining = [bucket for bucket in remaining if bucket not in served]
        if served:
            record = candidate.record(served, target, tools, store)
            built.append({"record": record, "buckets": served, "seconds": round(time.monotonic() - start, 3)})
        if not remaining:
            return built
    raise _gap(unit, spec, backend, remaining[0])


class _Hint(NamedTuple):
    """Example sizes that code is generated for: an M and, for an op with a second ladder, a value of its integer."""

    m: int
    second: int | None = None


def _hints(spec: OpSpec, buckets: Sequence[int]) -> list[_Hint]:
    """Hints to try until every bucket is served: a common M, then one within each bucket.

    Buckets of more rows have their own ones alone: Helion makes no TMA descriptors of tiles with more rows than the hint.
    """
    own = [_hint_in(spec, bucket) for bucket in buckets]
    if all(hint.m == 1 for hint in own) or all(spec.ladders.bounds(bucket)[0] > HINT for bucket in buckets):
        return own
    return [*dict.fromkeys(_Hint(common_m(spec), hint.second) for hint in own), *own]


def _hint_in(spec: OpSpec, bucket: int) -> _Hint:
    first, last = spec.ladders.bounds(bucket)
    if spec.second is None:
        return _Hint(last or first + 1)
    low, high = spec.ladders.second_bounds(bucket)
    return _Hint(last or first + 1, high or low + 1)


def _may_serve(spec: OpSpec, hint: _Hint, buckets: Sequence[int]) -> bool:
    """Whether code for a value of the second integer may serve one of the buckets: it holds that value."""
    if hint.second is None:
        return bool(buckets)
    return bool(set(spec.ladders.of_second(hint.second)) & set(buckets))


def _gap(unit: Unit, spec: OpSpec, backend: ModuleType, bucket: int) -> BuildError:
    hint = _hint_in(spec, bucket)
    candidate = Candidate(unit, spec, backend, hint.m, hint.second)
    first, last = spec.ladders.bounds(bucket)
    low, high = candidate.interval
    if serves(low, high, spec.ladders, bucket, spec.is_closed) and spec.second is not None:
        return _second_gap(spec, candidate, bucket)
    problem = candidate.objection(low - 1) if low > first else candidate.objection(high + 1)
    return BuildError(
        f"bucket {bucket} holds M from {first} to {last or f'at least {OPEN_BUCKET_M}'}, "
        f"but code generated for M = {candidate.hint} is valid for {low} to {high} only: {problem}. "
        "Choose a config with pointer indexing, or another ladder"
    )


def _second_gap(spec: OpSpec, candidate: Candidate, bucket: int) -> BuildError:
    name = spec.ladders.arg
    first, last = spec.ladders.second_bounds(bucket)
    low, high = candidate.second_interval
    if serves_second(low, high, spec.ladders, bucket):
        return BuildError(f"bucket {bucket}: {candidate.corner_objection(bucket)}. Choose another config, or another ladder")
    problem = candidate.objection(candidate.hint, second=low - 1 if low > first else high + 1)
    return BuildError(
        f"bucket {bucket} holds {name} from {first} to {last or f'at least {OPEN_BUCKET_M}'}, "
        f"but code generated for {name} = {candidate.second} is valid for {low} to {high} only: {problem}. "
        "Choose another config, or another ladder"
    )


class Candidate:
    """A unit's kernel, generated and traced for one hint of M, and of the second ladder's integer."""

    def __init__(self, unit: Unit, spec: OpSpec, backend: ModuleType, hint: int, second: int | None = None) -> None:
        self.unit = unit
        self.hint = hint
        self.second = second
        self.module = importlib.import_module(f"{unit.package}.{unit.backend}")
        allocates = backend.allocates(self.module, spec)
        self.maker = CallMaker(spec, spec.variant(unit.variant), unit.shape, second, allocates)
        self.side: HostSide = backend.host_side(self.module, unit.config, self.maker, hint)
        self.trace = trace(self.side.host, self.maker.symbolic(hint))

    @cached_property
    def interval(self) -> tuple[int, int]:
        """First and last M that the code is valid for, around the hint. BuildError if they are not all Ms in between."""
        if problem := self.objection(self.hint):
            raise BuildError(f"code generated for M = {self.hint} is not valid for it: {problem}")
        if self.hint == 1:
            return 1, 1
        low = _border(self.hint, 1, self.objection)
        high = _border(self.hint, INT32_MAX, self.objection)
        checked = self.maker.dims() | {*_CHECKED_MS, low + 1, high - 1} | self.side.turns | turns(self.trace.guards)
        for m in sorted(checked):
            if low < m < high and (problem := self.objection(m)):
                raise BuildError(f"code is valid for M = {low} and {high}, but not for {m}: {problem}")
        return low, high

    @cached_property
    def second_interval(self) -> tuple[int, int]:
        """First and last value of the integer that has a ladder, for M = hint; all values for an op without one."""
        arg = self.maker.spec.second
        if arg is None or self.second is None:
            return 1, INT32_MAX
        hint = self.second

        def objection(value: int) -> str | None:
            return self.objection(self.hint, second=value)

        if problem := objection(hint):
            raise BuildError(f"code generated for {arg.name} = {hint} is not valid for it: {problem}")
        low, high = _border(hint, arg.minimum, objection), _border(hint, INT32_MAX, objection)
        for value in sorted({*_CHECKED_MS, low + 1, high - 1} | turns(self.trace.guards)):
            if low < value < high and (problem := objection(value)):
                raise BuildError(f"code is valid for {arg.name} = {low} and {high}, but not for {value}: {problem}")
        return low, high

    def serves(self, bucket: int) -> bool:
        """Whether the code is valid for all of a bucket."""
        ladders = self.maker.spec.ladders
        if not serves(*self.interval, ladders, bucket, self.maker.spec.is_closed):
            return False
        if ladders.arg is None:
            return True
        return serves_second(*self.second_interval, ladders, bucket) and self.corner_objection(bucket) is None

    def corner_objection(self, bucket: int) -> str | None:
        """Why the code is not valid where M and the second integer are both at a bucket's ends; None if it is.

        The intervals vary one of them at a time.
        """
        ladders = self.maker.spec.ladders
        low, high = self.interval
        ends = ladders.bounds(bucket)
        values = ladders.second_bounds(bucket)
        open_value = min(max(OPEN_BUCKET_M, ladders.second[-1] + 1), self.second_interval[1])
        for m in {max(ends[0], low), min(ends[1] or max(OPEN_BUCKET_M, ladders.m[-1] + 1), high)}:
            for value in {values[0], values[1] or open_value}:
                if problem := self.objection(m, second=value):
                    return f"the code is not valid for M = {m} and {ladders.arg} = {value}: {problem}"
        return None

    def objection(
        self, m: int, row_padding: int = ROW_PADDING, other: Mapping[str, int] | None = None, second: int | None = None
    ) -> str | None:
        """Why the traced launch is wrong at this M (and `other` generic sizes); None if it is right.

        `second` is a value of the integer that has a ladder; None: the one that the code was generated for. A call that a
        guard of the record refuses is not checked.
        """
        values = dict(other or {})
        if second is not None and self.maker.spec.second is not None:
            values[self.maker.spec.second.name] = second
        is_corner = second is not None and m != self.hint
        if (elements := self.maker.elements(m, values)) > MAX_ELEMENTS[self.side.index_bits]:
            return f"a tensor has {elements} elements, too many for {self.side.index_bits}-bit offsets"
        sizes = self.maker.leaf_values(m, row_padding, values)
        if (other or is_corner or row_padding not in (0, ROW_PADDING)) and self.is_refused(sizes):
            return None
        if not other and not self.side.agrees(m, row_padding, values):
            return f"{self.unit.backend} would generate other code for M = {m} and rows padded by {row_padding} elements"
        for guard in self.assumptions:
            # torch adds an M != 1 guard for views that does not matter; the concrete run below checks M = 1.
            if not evaluate(guard, sizes) and (m > 1 or _leaves(guard) != {"M"}):
                return f"the host function assumes {render(guard)}"
        expected = self.trace.launch.at({symbol: sizes[leaf] for symbol, leaf in self.trace.leaves.items()})
        actual = trace(self.side.host, self.maker.concrete(m, row_padding, values)).launch
        return _difference(expected, actual) or _misfit(actual, self.trace.launch)

    @cached_property
    def assumptions(self) -> list[Expr]:
        """Facts about M and the row strides that the host function's branches assumed. BuildError for one about a float."""
        for guard in self.trace.guards:
            if unknown := [str(symbol) for symbol in guard.free_symbols if symbol not in self.trace.leaves]:
                raise BuildError(
                    f"the host function branches on a float argument ({unknown[0]} in {guard}); decide it in the kernel"
                )
        return [postfix(guard, self.trace.leaves) for guard in self.trace.guards]

    def is_refused(self, sizes: Mapping[str, int]) -> bool:
        """Whether a guard about anything but M fails for these leaves, or a TMA descriptor cannot be."""
        failed = (_leaves(guard) - {"M"} and not evaluate(guard, sizes) for guard in self.assumptions)
        return any(failed) or self._has_odd_descriptor(sizes)

    def _has_odd_descriptor(self, sizes: Mapping[str, int]) -> bool:
        launch = self.trace.launch.at({symbol: sizes[leaf] for symbol, leaf in self.trace.leaves.items()})
        return any(isinstance(arg, Descriptor) and arg.odd_strides() for arg in launch.args.values())

    def guards(self, classes: Sequence[MClass]) -> list[Guard]:
        """The facts that a call is tested for; what is about M alone, or the second integer alone, is in its interval."""
        own = ({"M"}, {self.maker.spec.ladders.arg})
        exprs = [assumption for assumption in self.assumptions if not any(_leaves(assumption) <= leaf for leaf in own)]
        assumed = {leaf for m_class in classes for leaf in triton_backend.assumed_strides(self.trace, m_class)}
        exprs += [[leaf, ALIGNMENT, "%", 0, "=="] for leaf in sorted(assumed)]
        exprs += [[symbol, 1, ">="] for symbol in self.maker.generic()]
        if self.side.index_bits == 32:
            if free := [*self.maker.generic(), *(arg.name for arg in self.maker.freely_strided())]:
                raise BuildError(f"{free[0]} is known per call only, which takes 64-bit offsets; INDEX_BITS is 32")
            exprs += [self._int32_guard(arg.name) for arg in self.maker.row_strided()]
        self._check_paddings(all(f"{arg.name}.stride(0)" in assumed for arg in self.maker.row_strided()))
        self._check_contiguous()
        for other in self.maker.other_sizes():
            for m in (1, 2, 16, 33):
                if self.interval[0] <= m <= self.interval[1] and (problem := self.objection(m, 0, other)):
                    raise BuildError(f"the code is not valid for {other} and M = {m}: {problem}")
        return guards_of(exprs)

    def _int32_guard(self, name: str) -> Expr:
        """The last element of a row-strided tensor is within reach of 32-bit offsets: rows * stride < 2**31."""
        m = self.trace.symbol("M")
        arg = next(arg for arg in self.maker.row_strided() if arg.name == name)
        rows = self.maker.rows(arg, m)
        return [*postfix(rows, self.trace.leaves), f"{name}.stride(0)", "*", INT32_MAX, "<="]

    def _check_contiguous(self) -> None:
        """BuildError for sizes of which no call with contiguous tensors is served: hardly a call would get the row."""
        if self.unit.shape and self._has_odd_descriptor(self.maker.leaf_values(max(2, self.hint), row_padding=0)):
            said = ", ".join(f"{symbol}={size}" for symbol, size in self.unit.shape.items())
            raise BuildError(
                f"{said}: no call with contiguous tensors is served: TMA takes rows that are multiples of 16 bytes. "
                "Choose a config with pointer indexing, pad the sizes, or leave them to the op's fallback"
            )

    def _check_paddings(self, aligned: bool) -> None:
        for padding in (*_CHECKED_PADDINGS, *(() if aligned else (7,))):
            if problem := self.objection(self.hint, padding):
                raise BuildError(f"the code is not valid for every row stride: {problem}")

    def record(self, buckets: Sequence[int], target: GpuTarget, tools: Mapping[str, str], store: Store) -> Record:
        """The record for these buckets: compiles the classes of M that occur in them."""
        low, high = self.interval
        ladders = self.maker.spec.ladders
        occurring: set[MClass] = set()
        for bucket in buckets:
            first, last = ladders.bounds(bucket)
            occurring |= classes_of(max(first, low), min(last or high, high))
        classes = [m_class for m_class in M_CLASSES if m_class in occurring]
        guards = self.guards(classes)
        early = bool(self.side.early)
        codes = {
            m_class: triton_backend.compile_class(self.trace, m_class, target, tools, store, early=early) for m_class in classes
        }
        taken = [name for name in self.trace.launch.parameters() if any(name in code["kinds"] for code in codes.values())]
        aligned = triton_backend.samples(self.trace, classes[0])
        leaves = self.trace.leaves
        record: CubinRecord = {
            "launcher": "cubin",
            "backend": self.unit.backend,
            "kernel": self.module.__name__,
            "config": self.unit.config,
            "m_min": low,
            "m_max": high,
            "grid": [postfix(size, leaves) for size in self.trace.launch.grid],
            "params": [_param(name, self.trace, codes, name in aligned and aligned[name].multiple) for name in taken],
            "guards": guards,
            "cubins": {m_class: _cubin(code, taken) for m_class, code in codes.items()},
        }
        if ladders.arg is not None:
            record["second_min"], record["second_max"] = self.second_interval
        if self.side.early:
            record["early"] = list(self.side.early)
        return record


def _leaves(expr: Expr) -> set[str]:
    return {token for token in expr if isinstance(token, str) and token not in OPERATORS}


def _border(inside: int, outside: int, objection: Callable[[int], str | None]) -> int:
    """The M nearest to `outside` that there is no objection to, given none to `inside`; by bisection."""
    if objection(outside) is None:
        return outside
    while abs(outside - inside) > 1:
        middle = (inside + outside) // 2
        if objection(middle) is None:
            inside = middle
        else:
            outside = middle
    return inside


def _difference(expected: Launch, actual: Launch) -> str | None:
    """How two launches with everything known differ; None if they do not."""
    if expected.grid != actual.grid:
        return f"the grid is {actual.grid}, the trace says {expected.grid}"
    if expected.kernel is not actual.kernel or expected.options != actual.options:
        return f"it launches {_described(actual)}, the trace says {_described(expected)}"
    for name, arg in expected.args.items():
        if (Real(None, FLOAT_HINT) if isinstance(arg, Real) and arg.arg else arg) != actual.args[name]:
            return f"argument {name} is {actual.args[name]}, the trace says {arg}"
    return None


def _described(launch: Launch) -> str:
    return f"{launch.kernel.__name__} with {launch.options}"


def _misfit(actual: Launch, symbolic: Launch) -> str | None:
    """Why a launch does not fit a record: 32 bits for a number that varies, the GPU's grid limits. None if it does."""
    for axis, (size, limit) in enumerate(zip(actual.grid, MAX_GRID, strict=True)):
        if not isinstance(size, int) or not 1 <= size <= limit:
            return f"grid dimension {axis} is {size}, a GPU takes 1 to {limit}"
    traced = symbolic.parameters()
    for name, arg in actual.parameters().items():
        # A descriptor's strides are 64 bits wide.
        varies = isinstance(getattr(traced[name], "value", None), sympy.Basic) and ".strides[" not in name
        if varies and isinstance(arg, Number) and isinstance(arg.value, int) and not -INT32_MAX - 1 <= arg.value <= INT32_MAX:
            return f"argument {name} is {arg.value}, which does not fit 32 bits"
    return None


def _param(name: str, traced: Trace, codes: Mapping[MClass, Code], aligned: bool) -> Param:
    kinds = {code["kinds"][name] for code in codes.values() if name in code["kinds"]}
    if len(kinds) > 1:
        raise BuildError(
            f"parameter {name} has the types {sorted(kinds)} in different classes of M; annotate its type in the kernel"
        )
    (kind,) = kinds
    arg = traced.launch.parameters()[name]
    param: Param = {"kind": kind}
    if isinstance(arg, Descriptor):
        param |= _tensor_map(name, arg, traced, [code["maps"][name] for code in codes.values() if name in code["kinds"]])
    elif isinstance(arg, Pointer):
        param["arg"] = arg.arg
        if arg.offset != 0:
            param["offset"] = postfix(arg.offset, traced.leaves)
        if aligned:
            param["align"] = ALIGNMENT
    elif isinstance(arg, Real) and kind in ("f32", "f64"):
        if arg.arg is None:
            if not math.isfinite(arg.value):
                raise BuildError(
                    f"parameter {name} gets the constant {arg.value}, which a manifest cannot hold; write it in the kernel"
                )
            param["const"] = arg.value
        else:
            param["arg"] = arg.arg
    elif isinstance(arg, (Number, Flag)) and kind not in ("ptr", "f32", "f64"):
        param["value"] = postfix(arg.value, traced.leaves)
    else:
        raise BuildError(f"parameter {name} of type {kind} gets {arg}, which a record cannot express")
    return param


def _tensor_map(name: str, arg: Descriptor, traced: Trace, choices: Sequence[MapCode]) -> Param:
    if any(choice != choices[0] for choice in choices):
        raise BuildError(f"the TMA descriptor {name} is {choices} in the classes of M; a record holds one for all")
    if odd := arg.odd_strides():
        raise BuildError(
            f"the TMA descriptor {name} has a stride of {odd[0]} elements of {arg.dtype.itemsize} bytes; "
            f"it takes multiples of {ALIGNMENT} bytes"
        )
    param: Param = {
        "kind": "tensor_map",
        "arg": arg.arg,
        "map": {
            **choices[0],
            "shape": [postfix(size, traced.leaves) for size in arg.shape],
            "strides": [postfix(stride, traced.leaves) for stride in arg.strides[:-1]],
            "fill": "nan" if arg.fill_nan else "zero",
        },
    }
    if arg.offset != 0:
        param["offset"] = postfix(arg.offset, traced.leaves)
    return param


def _cubin(code: Code, taken: Sequence[str]) -> Cubin:
    return {
        "file": code["sha256"],
        "function": code["function"],
        "params": [index for index, name in enumerate(taken) if name in code["kinds"]],
        "num_warps": code["num_warps"],
        "shared_bytes": code["shared_bytes"],
        "cluster": code["cluster"],
        "cooperative": code["cooperative"],
        "pdl": code["pdl"],
    }
