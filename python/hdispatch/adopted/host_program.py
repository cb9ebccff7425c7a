"""A small Python function, a callable grid or a heuristic, becomes a program that C++ runs (csrc/host_program.h).

The function is run once on stand-ins that record what is computed from them. Integers and sizes of tensors stay open; None,
flags, strings and dtypes are taken as they are, and the program holds for calls that have the same. Whatever cannot be
followed (a branch on an open integer, a name that may be anything, an effect) makes the function one that has to be called.

Imports triton: import this module when a kernel of Triton's is there.
"""

from __future__ import annotations

import builtins
import dis
import types
from collections.abc import Callable, Mapping
from enum import IntEnum
from typing import Any, NoReturn

import torch
import triton  # type: ignore[import-untyped]
from triton.language import dtype as triton_dtype  # type: ignore[import-untyped]

MAX_SOURCES = 16
MAX_DEPTH = 16
MAX_STEPS = 64
INT64 = range(-(2**63), 2**63)

_NOTHING = object()


class SourceKind(IntEnum):
    """Where a value comes from."""

    PARAMETER, CELL, DEFAULT, GLOBAL = range(4)


class Guard(IntEnum):
    """What it must be."""

    INTEGER, OBJECT, TENSOR, ABSENT = range(4)


class Op(IntEnum):
    """A step of an expression in postfix order."""

    CONST, INTEGER, NUMEL, SIZE, STRIDE, CONTIGUOUS = range(6)
    ADD, SUB, MUL, DIV, MOD, MIN, MAX, EQ, NE, LT, LE, GT, GE, NEXT_POWER_OF_2, AND, OR = range(6, 22)


class Kind(IntEnum):
    """What a result is."""

    INTEGER, BOOL, OBJECT = range(3)


Step = tuple[int, int, int]
Steps = list[Step]
#: ([(kind, guard, index, name, object)], [steps of each result], [(kind, object) of each result])
Program = tuple[list[tuple[int, int, int, object, object]], list[Steps], list[tuple[int, object]]]

#: What a function that is followed does not do: effects, imports, handling of errors.
_REFUSED = (
    *("STORE_GLOBAL", "STORE_ATTR", "STORE_SUBSCR", "STORE_DEREF", "STORE_NAME", "STORE_SLICE", "DELETE", "IMPORT", "YIELD"),
    *("SEND", "GET_", "MAKE_FUNCTION", "SETUP", "BEFORE_WITH", "LOAD_BUILD_CLASS", "LOAD_NAME", "RAISE", "FORMAT"),
)

_CDIV, _NEXT_POWER_OF_2 = triton.cdiv, triton.next_power_of_2


class _Unfollowed(BaseException):
    """Not an Exception, so that nothing in the function catches it."""


def trace(names: Mapping[str, int], function: types.FunctionType, arguments: dict[str, Any]) -> Program | None:
    """The program of `function(arguments)` for calls like this one; None if it has to be called.

    names   index of each of the kernel's parameters
    """
    if not _may_follow(function):
        return None
    try:
        return _Tracer(names, function, arguments).program()
    except _Unfollowed:
        return None
    except Exception:  # the caller calls the function itself, which raises it again
        return None


def _may_follow(function: types.FunctionType) -> bool:
    code = function.__code__
    if code.co_argcount - len(function.__defaults__ or ()) > 1 or code.co_argcount < 1 or code.co_kwonlyargcount:
        return False
    if code.co_flags & (0x04 | 0x08 | 0x20 | 0x80) or code.co_exceptiontable or code.co_cellvars:
        return False
    if any(isinstance(constant, types.CodeType) for constant in code.co_consts):
        return False
    return not any(step.opname.startswith(_REFUSED) for step in dis.get_instructions(code))


class _Tracer:
    def __init__(self, names: Mapping[str, int], function: types.FunctionType, arguments: dict[str, Any]) -> None:
        self.names, self.function, self.arguments = names, function, arguments
        self.sources: list[tuple[int, int, int, object, object]] = []
        self.known: dict[tuple[SourceKind, object], Any] = {}

    def program(self) -> Program:
        function = self.function
        cells = [
            types.CellType(self.stand_in(SourceKind.CELL, index, "", cell.cell_contents))
            for index, cell in enumerate(function.__closure__ or ())
        ]
        defaults = [self.stand_in(SourceKind.DEFAULT, i, "", value) for i, value in enumerate(function.__defaults__ or ())]
        scope = {name: self.from_globals(name) for name in _global_names(function.__code__)}
        copy = types.FunctionType(
            function.__code__, {**scope, "__builtins__": {}}, function.__name__, tuple(defaults), tuple(cells) or None
        )
        result = copy(_Arguments(self))
        listed = list(result) if type(result) in (tuple, list) else [result]
        if type(result) in (tuple, list) and not 1 <= len(listed) <= 3:
            raise _Unfollowed
        made = [_result(value) for value in listed]
        return self.sources, [steps for steps, _ in made], [kind for _, kind in made]

    def from_globals(self, name: str) -> Any:
        scope = self.function.__globals__
        if name in scope:
            return self.stand_in(SourceKind.GLOBAL, 0, name, scope[name])
        self.add(SourceKind.GLOBAL, Guard.ABSENT, 0, name, None)
        found = getattr(builtins, name, _NOTHING)
        if found is min or found is max:
            return _chooser(Op.MIN if found is min else Op.MAX)
        raise _Unfollowed

    def parameter(self, name: object) -> Any:
        if not isinstance(name, str) or name not in self.names or name not in self.arguments:
            raise _Unfollowed
        key = (SourceKind.PARAMETER, name)
        if key not in self.known:
            self.known[key] = self.stand_in(SourceKind.PARAMETER, self.names[name], name, self.arguments[name])
        return self.known[key]

    def add(self, kind: SourceKind, guard: Guard, index: int, name: str, value: object) -> int:
        if len(self.sources) >= MAX_SOURCES:
            raise _Unfollowed
        self.sources.append((kind, guard, index, name, value))
        return len(self.sources) - 1

    def stand_in(self, kind: SourceKind, index: int, name: str, value: object) -> Any:
        if type(value) is int:
            if value not in INT64:
                raise _Unfollowed
            return _Number([(Op.INTEGER, self.add(kind, Guard.INTEGER, index, name, None), 0)])
        if type(value) in (torch.Tensor, torch.nn.Parameter):
            return _Tensor(self.add(kind, Guard.TENSOR, index, name, None))
        if value is triton:
            self.add(kind, Guard.OBJECT, index, name, value)
            return _Triton()
        for found, stand_in in ((_CDIV, _cdiv), (_NEXT_POWER_OF_2, _next_power_of_2)):
            if value is found:
                self.add(kind, Guard.OBJECT, index, name, value)
                return stand_in
        if value is None or isinstance(value, (bool, str, torch.dtype)) or type(value) is triton_dtype:
            self.add(kind, Guard.OBJECT, index, name, value)
            return value
        raise _Unfollowed


def _global_names(code: types.CodeType) -> list[str]:
    return list(dict.fromkeys(str(step.argval) for step in dis.get_instructions(code) if step.opname == "LOAD_GLOBAL"))


def _result(value: object) -> tuple[Steps, tuple[int, object]]:
    if isinstance(value, _Truth):
        return value.steps, (Kind.BOOL, None)
    if isinstance(value, _Number):
        return value.steps, (Kind.INTEGER, None)
    if type(value) is int and value in INT64:
        return [(Op.CONST, value, 0)], (Kind.INTEGER, None)
    if value is None or isinstance(value, (bool, str)):
        return [], (Kind.OBJECT, value)
    raise _Unfollowed


# ---- stand-ins ----


def _unfollowed(*_args: object, **_keywords: object) -> NoReturn:
    raise _Unfollowed


class _Opaque:
    """Whatever is not said raises."""

    __slots__ = ()

    def __getattr__(self, name: str) -> Any:
        raise _Unfollowed

    __bool__ = __index__ = __int__ = __float__ = __len__ = __iter__ = __contains__ = __call__ = _unfollowed
    __str__ = __repr__ = __format__ = __hash__ = _unfollowed

    def __getitem__(self, key: object) -> Any:
        raise _Unfollowed


class _Arguments(_Opaque):
    __slots__ = ("_tracer",)

    def __init__(self, tracer: _Tracer) -> None:
        self._tracer = tracer

    def __getitem__(self, key: object) -> Any:
        return self._tracer.parameter(key)


class _Triton(_Opaque):
    """The module."""

    __slots__ = ()

    @property
    def cdiv(self) -> Any:
        return _cdiv if triton.cdiv is _CDIV else _unfollowed()

    @property
    def next_power_of_2(self) -> Any:
        return _next_power_of_2 if triton.next_power_of_2 is _NEXT_POWER_OF_2 else _unfollowed()


class _Tensor(_Opaque):
    __slots__ = ("_source",)

    def __init__(self, source: int) -> None:
        self._source = source

    def numel(self) -> _Number:
        return _Number([(Op.NUMEL, self._source, 0)])

    def size(self, dimension: object) -> _Number:
        return self._dimension(Op.SIZE, dimension)

    def stride(self, dimension: object) -> _Number:
        return self._dimension(Op.STRIDE, dimension)

    @property
    def shape(self) -> _Shape:
        return _Shape(self)

    def _dimension(self, op: Op, dimension: object) -> _Number:
        if type(dimension) is not int or not -8 <= dimension < 8:
            raise _Unfollowed
        return _Number([(op, self._source, dimension)])

    def __eq__(self, other: object) -> bool:
        raise _Unfollowed

    __hash__ = _unfollowed


class _Shape(_Opaque):
    __slots__ = ("_tensor",)

    def __init__(self, tensor: _Tensor) -> None:
        self._tensor = tensor

    def __getitem__(self, key: object) -> Any:
        return self._tensor.size(key)


class _Steps(_Opaque):
    __slots__ = ("steps",)

    def __init__(self, steps: Steps) -> None:
        self.steps = steps


class _Truth(_Steps):
    """Of a comparison: it can be a result, and nothing else."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        raise _Unfollowed

    __hash__ = _unfollowed


def _steps_of(value: object) -> Steps:
    if isinstance(value, _Number):
        return value.steps
    if type(value) is int and value in INT64:
        return [(Op.CONST, value, 0)]
    raise _Unfollowed


def _join(op: Op, left: object, right: object) -> Steps:
    steps = [*_steps_of(left), *_steps_of(right), (op, 0, 0)]
    depth = deepest = 0
    for code, _, _ in steps:
        depth += 1 if code <= Op.CONTIGUOUS else 0 if code == Op.NEXT_POWER_OF_2 else -1
        deepest = max(deepest, depth)
    if deepest > MAX_DEPTH or len(steps) > MAX_STEPS:
        raise _Unfollowed
    return steps


def _arithmetic(op: Op, reflected: bool = False) -> Callable[[Any, object], _Number]:
    return lambda self, other: _Number(_join(op, other, self) if reflected else _join(op, self, other))


def _comparison(op: Op) -> Callable[[Any, object], Any]:
    return lambda self, other: _Truth(_join(op, self, other))


class _Number(_Steps):
    """An integer that is known per call only."""

    __slots__ = ()

    __add__, __radd__ = _arithmetic(Op.ADD), _arithmetic(Op.ADD, True)
    __sub__, __rsub__ = _arithmetic(Op.SUB), _arithmetic(Op.SUB, True)
    __mul__, __rmul__ = _arithmetic(Op.MUL), _arithmetic(Op.MUL, True)
    __floordiv__, __rfloordiv__ = _arithmetic(Op.DIV), _arithmetic(Op.DIV, True)
    __mod__, __rmod__ = _arithmetic(Op.MOD), _arithmetic(Op.MOD, True)
    __lt__, __le__, __gt__, __ge__ = (_comparison(op) for op in (Op.LT, Op.LE, Op.GT, Op.GE))
    __eq__ = _comparison(Op.EQ)
    __ne__ = _comparison(Op.NE)
    __hash__ = _unfollowed

    def __neg__(self) -> _Number:
        return _Number(_join(Op.SUB, 0, self))


def _cdiv(x: object, y: object) -> Any:
    if type(x) is int and type(y) is int:
        return (x + y - 1) // y
    return _Number(_join(Op.DIV, _Number(_join(Op.SUB, _Number(_join(Op.ADD, x, y)), 1)), y))


def _next_power_of_2(n: object) -> Any:
    if type(n) is int:
        return _NEXT_POWER_OF_2(n)
    return _Number([*_steps_of(n), (Op.NEXT_POWER_OF_2, 0, 0)])


def _chooser(op: Op) -> Callable[..., Any]:
    def choose(*values: object) -> Any:
        if len(values) < 2 or not all(type(value) is int or isinstance(value, _Number) for value in values):
            raise _Unfollowed
        chosen = values[0]
        for value in values[1:]:
            chosen = _Number(_join(op, chosen, value))
        return chosen

    return choose
