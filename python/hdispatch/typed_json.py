"""Checks parsed JSON against TypedDict declarations, so that a declaration is also the check; parses JSON without any loss.

Exact: `true` is no integer, 1.0 is no integer, an integer is a float; integers fit 64 bits, floats are finite. A field that
is not declared is left alone: newer writers may add optional ones. No string holds NUL: what takes it as C's would read a
part of it.
"""

from __future__ import annotations

import functools
import json
import math
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NotRequired, Union, get_args, get_origin, get_type_hints, is_typeddict

Checker = Callable[[Any], None]

#: No file of ours nests deeper; walks over what was read stay far from Python's own limit.
MOST_NESTED = 64


class Mismatch(Exception):
    """The value is not of the declared type. The text begins with the path to it: `.rows[3].K is 'x'; …`."""


@dataclass(frozen=True)
class _Repeated:
    """Stands for an object that has a name twice: Python would keep the last and say nothing."""

    name: str


def canonical(value: object) -> str:
    """JSON with sorted keys and no spaces: equal values have equal texts. ValueError for NaN and infinities."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def parse(text: str | bytes) -> Any:
    """The value of a JSON text. `Mismatch` for a name that an object repeats and for deep nesting; ValueError for no JSON."""
    try:
        value = json.loads(text, object_pairs_hook=_object)
    except RecursionError:
        raise Mismatch(f" is nested deeper than {MOST_NESTED} levels") from None
    todo: list[tuple[str, Any, int]] = [("", value, 0)]
    while todo:
        path, each, depth = todo.pop()
        if isinstance(each, _Repeated):
            raise Mismatch(f"{path} repeats the name {_show(each.name)}; it takes it once")
        if depth > MOST_NESTED:
            raise Mismatch(f"{path[:80]}... is nested deeper than {MOST_NESTED} levels")
        if isinstance(each, dict):
            todo += [(f"{path}.{name}", inner, depth + 1) for name, inner in each.items() if isinstance(inner, _CONTAINERS)]
        elif isinstance(each, list):
            todo += [(f"{path}[{at}]", inner, depth + 1) for at, inner in enumerate(each) if isinstance(inner, _CONTAINERS)]
    escape = b"\\ud" if isinstance(text, bytes) else "\\ud"
    if escape in text.lower():  # type: ignore[operator]
        _refuse_surrogates(value)
    return value


def _refuse_surrogates(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise Mismatch(f" holds {error.object[error.start]!a}, half of a character, which no file can have") from None


_CONTAINERS = (dict, list, _Repeated)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any] | _Repeated:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    seen: set[str] = set()
    return _Repeated(next(name for name, _ in pairs if name in seen or seen.add(name)))  # type: ignore[func-returns-value]


def check(value: object, kind: Any) -> None:
    """Raise `Mismatch` unless `value` is of `kind`: a TypedDict, list, dict, Literal, union, str, int, float, bool or Any.

    Unions of TypedDicts are told apart by a field that is a Literal of one value in each.
    """
    _checker(kind)(value)


@functools.cache
def _checker(kind: Any) -> Checker:
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any:
        return lambda _: None
    if is_typeddict(kind):
        return _typed_dict(kind)
    if origin is list:
        return _list(_checker(args[0]))
    if origin is dict:
        return _dict(_checker(args[0]), _checker(args[1]))
    if origin is Literal:
        return _literal(args)
    if origin in (Union, types.UnionType) and (tag := _tag(args)):
        return _tagged(*tag)
    if origin in (Union, types.UnionType):
        return _union(args)
    return _plain(kind)


def _typed_dict(kind: Any) -> Checker:
    fields = []
    for name, hint in get_type_hints(kind, include_extras=True).items():
        optional = get_origin(hint) is NotRequired
        fields.append((name, optional, _checker(get_args(hint)[0] if optional else hint)))

    def check(value: Any) -> None:
        _expect(value, dict)
        for name, optional, inner in fields:
            if name in value:
                try:
                    inner(value[name])
                except Mismatch as error:
                    raise Mismatch(f".{name}{error}") from None
            elif not optional:
                raise Mismatch(f".{name} is missing")

    return check


def _list(inner: Checker) -> Checker:
    def check(value: Any) -> None:
        _expect(value, list)
        index = 0
        try:
            for item in value:
                inner(item)
                index += 1
        except Mismatch as error:
            raise Mismatch(f"[{index}]{error}") from None

    return check


def _dict(key_checker: Checker, inner: Checker) -> Checker:
    def check(value: Any) -> None:
        _expect(value, dict)
        key = None
        try:
            for key, item in value.items():
                key_checker(key)
                inner(item)
        except Mismatch as error:
            raise Mismatch(f"[{key!r}]{error}") from None

    return check


def _literal(choices: tuple[object, ...]) -> Checker:
    def check(value: Any) -> None:
        if type(value) is not str or value not in choices:
            raise Mismatch(f" is {_show(value)}; it takes one of {', '.join(map(str, choices))}")

    return check


def _tag(kinds: tuple[Any, ...]) -> tuple[str, dict[str, Any]] | None:
    """The field that tells TypedDicts apart, a Literal of one value in each, and the TypedDict of each value."""
    if not all(is_typeddict(kind) for kind in kinds):
        return None
    hints = [get_type_hints(kind) for kind in kinds]
    for name in hints[0]:
        values = [get_args(each.get(name)) for each in hints]
        if all(get_origin(each.get(name)) is Literal for each in hints) and all(len(value) == 1 for value in values):
            return name, {value[0]: kind for value, kind in zip(values, kinds, strict=True)}
    return None


def _tagged(name: str, kinds: dict[str, Any]) -> Checker:
    def check(value: Any) -> None:
        _expect(value, dict)
        tag = value.get(name)
        if name not in value:
            raise Mismatch(f".{name} is missing")
        if type(tag) is not str or tag not in kinds:
            raise Mismatch(f".{name} is {_show(tag)}; it takes one of {', '.join(kinds)}")
        _checker(kinds[tag])(value)

    return check


def _union(kinds: tuple[Any, ...]) -> Checker:
    inner = [_checker(kind) for kind in kinds]
    # `int | str` equals `str | int`, so both have one checker: its words must not depend on who came first.
    words = " | ".join(sorted(getattr(kind, "__name__", str(kind)) for kind in kinds))

    def check(value: Any) -> None:
        for each in inner:
            try:
                return each(value)
            except Mismatch:
                pass
        raise Mismatch(f" is {_show(value)}; it takes {words}")

    return check


def _plain(kind: Any) -> Checker:
    if kind is int:

        def check_int(value: Any) -> None:
            _expect(value, int)
            if not -(2**63) <= value < 2**63:
                raise Mismatch(f" is {_show(value)}; integers fit 64 bits")

        return check_int
    if kind is float:

        def check_float(value: Any) -> None:
            if type(value) is not float:
                _expect(value, int, "float")
            elif not math.isfinite(value):
                raise Mismatch(f" is {value}; floats are finite")

        return check_float
    if kind is str:

        def check_str(value: Any) -> None:
            _expect(value, str)
            if "\0" in value:
                raise Mismatch(f" is {_show(value)}; strings hold no NUL")

        return check_str
    if kind is not bool:
        raise TypeError(f"{kind} is not one that a declaration may hold")
    return lambda value: _expect(value, bool)


def _expect(value: object, kind: type, wanted: str = "") -> None:
    if type(value) is not kind:
        raise Mismatch(f" is {_show(value)}, of type {type(value).__name__}; it takes {wanted or kind.__name__}")


def _show(value: object) -> str:
    text = repr(value) if not isinstance(value, int) or abs(value) < 2**128 else hex(value)
    return text if len(text) <= 80 else text[:77] + "..."
