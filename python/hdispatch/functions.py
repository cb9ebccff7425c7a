"""Rows that are functions of this process: any live TVM-FFI function, with the key it serves and how it is called."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from . import _C, registry
from .errors import HdispatchError
from .ladders import Ladders
from .manifest import FfiArg, Guard, check_views
from .opspec import BoolArg, FloatArg, NoneArg, OpSpec, StrArg, TensorArg

Stream = Literal["environment", "argument", "none"]
MAX_M = 2**63 - 1


class Key(NamedTuple):
    """Which calls of an op a row serves.

    variant  the name of one of the op's variants: `OpSpec.variants()`
    K, N     exactly this size; 0: every size of it. A row with the exact size comes before one without
    M        any M of one bucket of the op's ladder, whose Ms are served; None: every M
    second   likewise of the integer argument that has a ladder; None: every value
    """

    variant: str
    K: int = 0
    N: int = 0
    M: int | None = None
    second: int | None = None


@dataclass(frozen=True)
class Function:
    """A function and what it serves. `handle` is that of libtvm_ffi, and is kept for ever."""

    op: str
    key: Key
    handle: int
    record: dict[str, Any] = field(repr=False)


def make(
    op: _C.Op | str,
    key: Key,
    function: object,
    *,
    args: Sequence[FfiArg] | None,
    guards: Sequence[Guard],
    stream: Stream,
    pdl: bool,
    early: Sequence[str],
    m_range: tuple[int, int] | None,
    label: str,
) -> Function:
    """A function with its record; arguments as those of `hdispatch.register`."""
    name = op if isinstance(op, str) else op.name
    spec = registry.spec(name)
    if key.variant not in spec.variant_arguments():
        raise HdispatchError(f"{name} has no variant {key.variant!r}; it has {', '.join(spec.variant_arguments())}")
    if key.M is not None and key.M < 1:
        raise HdispatchError(f"M is {key.M}; a bucket's Ms are 1 or more")
    if key.second is not None and (spec.second is None or key.second < 1):
        has = "has no argument with a ladder" if spec.second is None else f"takes a {spec.second.name} of at least 1"
        raise HdispatchError(f"the key's second is {key.second}; {name} {has}")
    if stream not in ("environment", "argument", "none"):
        raise HdispatchError(f"stream is {stream!r}; it takes 'environment', 'argument' or 'none'")
    raw = _keep(function)
    taken = list(default_args(spec, key.variant, stream) if args is None else args)
    check_views(label, taken, spec.variant_arguments()[key.variant])
    record = {
        "kernel": label,
        "function": label,
        "m_min": m_range[0] if m_range else 1,
        "m_max": m_range[1] if m_range else MAX_M,
        **({} if spec.second is None else {"second_min": 1, "second_max": MAX_M}),
        "guards": [dict(guard) for guard in guards],
        "early": list(early),
        "args": [dict(arg) for arg in taken],
        "pdl": pdl,
        "env_stream": stream == "environment" and not any(arg["kind"] == "stream" for arg in taken),
    }
    return Function(name, key, int(raw.__chandle__()), record)


#: id of a function that was ever in a table -> it and its TVM-FFI object: a call may be in it, and a captured graph holds its
#: kernels. One entry however often it is registered.
_KEPT: dict[int, tuple[object, Any]] = {}


def _keep(function: object) -> Any:
    """The TVM-FFI object of a function, the same each time."""
    return _KEPT.setdefault(id(function), (function, raw_function(function)))[1]


def raw_function(function: object) -> Any:
    """The TVM-FFI object itself: a wrapper in Python would be entered on every call, which takes a microsecond."""
    convert = getattr(function, "__tvm_ffi_object__", None)
    raw = convert() if convert else function
    if not hasattr(raw, "__chandle__"):
        raise HdispatchError(
            f"{function!r} is no TVM-FFI function: it takes a tvm_ffi.Function, or what has __tvm_ffi_object__(), as "
            "CuteDSL's compiled functions have"
        )
    return raw


def default_args(spec: OpSpec, variant: str, stream: Stream = "environment") -> list[FfiArg]:
    """The op's arguments in order, None where the variant has none, the variant's strings; then the workspace of an op
    that has one, and the stream if it is an argument.
    """
    absent, static = set(spec.variant(variant).none), spec.variant(variant).static
    made: list[FfiArg] = []
    for arg in spec.args:
        if isinstance(arg, NoneArg) or arg.name in absent:
            made.append({"kind": "none"})
        elif isinstance(arg, TensorArg):
            made.append({"kind": "tensor", "arg": arg.name})
        elif isinstance(arg, FloatArg):
            made.append({"kind": "float", "arg": arg.name})
        elif isinstance(arg, StrArg):
            made.append({"kind": "str", "text": str(static[arg.name])})
        else:
            made.append({"kind": "bool" if isinstance(arg, BoolArg) else "int", "value": [arg.name]})
    if spec.workspace is not None:
        has_one = spec.workspace_bytes(spec.variant(variant)) > 0
        made.append({"kind": "tensor", "arg": spec.workspace.name} if has_one else {"kind": "none"})
    return [*made, {"kind": "stream"}] if stream == "argument" else made


def add_all(builder: _C.TableBuilder, functions: Sequence[Function], ladders: dict[str, Ladders]) -> None:
    """Put functions into a table; of several with one key the last one. `ladders` are those of the ops that it has already."""
    rows: dict[tuple[str, str, int, int, int], int] = {}
    ladders = dict(ladders)
    for each in functions:
        op = registry.get(each.op)
        if each.op not in ladders:
            ladders[each.op] = registry.spec(each.op).ladders
            builder.set_ladder(op, ladders[each.op].m, ladders[each.op].second)
        served = ladders[each.op]
        index = builder.add_function(op, each.record, each.handle)
        buckets = set(range(served.count))
        if each.key.M is not None:
            buckets &= set(served.of_m(_C.bucket(served.m, each.key.M)))
        if each.key.second is not None:
            buckets &= set(served.of_second(each.key.second))
        rows |= {(each.op, each.key.variant, each.key.K, each.key.N, bucket): index for bucket in buckets}
    for (name, variant, k, n, bucket), index in rows.items():
        builder.add_row(registry.get(name), variant, k, n, bucket, index)
