"""Integer expressions: from sympy to the manifest's postfix lists, and what can be proved and computed about them.

`manifest.py` lists the leaves and operators; `evaluate` here and csrc/expr.cpp give the same values, and both refuse
what leaves 64 bits or divides by zero.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import reduce
from typing import Any, TypeAlias

import sympy  # type: ignore[import-untyped]
from torch.utils._sympy import functions as torch_sympy

from ..errors import BuildError
from ..manifest import Expr, Guard

#: Values on the stack at once, as in csrc/expr.h.
MAX_DEPTH = 16

#: A host value that is known, or that depends on the call.
Value: TypeAlias = int | sympy.Basic

Leaves = Mapping[sympy.Symbol, str]

#: Operators of a postfix list.
OPERATORS: dict[str, Callable[[int, int], int]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "//": operator.floordiv,
    "%": operator.mod,
    "min": min,
    "max": max,
    "==": lambda a, b: int(a == b),
    "!=": lambda a, b: int(a != b),
    "<": lambda a, b: int(a < b),
    "<=": lambda a, b: int(a <= b),
    ">": lambda a, b: int(a > b),
    ">=": lambda a, b: int(a >= b),
    "and": lambda a, b: int(bool(a) and bool(b)),
    "or": lambda a, b: int(bool(a) or bool(b)),
}

#: Loosest first; what `render` puts parentheses by.
_PRECEDENCE = (("or",), ("and",), ("==", "!=", "<", "<=", ">", ">="), ("+", "-"), ("*", "//", "%"))
_ATOM = len(_PRECEDENCE)

_RELATIONS: dict[type[sympy.Basic], str] = {
    sympy.Equality: "==",
    sympy.Unequality: "!=",
    sympy.StrictLessThan: "<",
    sympy.LessThan: "<=",
    sympy.StrictGreaterThan: ">",
    sympy.GreaterThan: ">=",
}

_FOLDED: dict[type[sympy.Basic], str] = {
    sympy.And: "and",
    sympy.Or: "or",
    sympy.Min: "min",
    sympy.Max: "max",
    torch_sympy.Min: "min",
    torch_sympy.Max: "max",
}

_BINARY: dict[type[sympy.Basic], str] = {
    torch_sympy.FloorDiv: "//",
    torch_sympy.CleanDiv: "//",
    torch_sympy.Mod: "%",
    torch_sympy.PythonMod: "%",
    sympy.Mod: "%",
}


def postfix(value: Value, leaves: Leaves) -> Expr:
    """The manifest's form of a host value. `leaves` names its symbols.

    BuildError for a construct that is not integer arithmetic (true division, floats), for an unnamed symbol, and for an
    expression that needs more than MAX_DEPTH values at once.
    """
    tokens: Expr = [int(value)] if isinstance(value, int) else _tokens(value, leaves)
    if (deepest := depth(tokens)) > MAX_DEPTH:
        raise BuildError(f"expression {value} is {deepest} values deep, the launcher takes {MAX_DEPTH}; simplify the host code")
    return tokens


def _tokens(value: sympy.Basic, leaves: Leaves) -> Expr:
    kind = type(value)
    if isinstance(value, sympy.Integer):
        return [int(value)]
    if value in (sympy.true, sympy.false):
        return [int(value is sympy.true)]
    if isinstance(value, sympy.Symbol):
        if value not in leaves:
            raise BuildError(f"expression holds {value}, which is no size or stride of the call: {sorted(leaves.values())}")
        return [leaves[value]]
    if isinstance(value, sympy.Add):
        return _sum(value, leaves)
    if isinstance(value, sympy.Mul):
        return _fold(_constants_last(value.args), "*", leaves)
    if kind in _FOLDED:
        return _fold(_constants_last(value.args), _FOLDED[kind], leaves)
    if kind in _BINARY:
        return _fold(value.args, _BINARY[kind], leaves)
    if kind in _RELATIONS:
        return _fold(value.args, _RELATIONS[kind], leaves)
    if isinstance(value, sympy.Pow) and isinstance(value.exp, sympy.Integer) and 1 <= int(value.exp) <= 8:
        return _fold((value.base,) * int(value.exp), "*", leaves)
    if isinstance(value, torch_sympy.ModularIndexing):
        base, divisor, modulus = value.args
        return [*_fold((base, divisor), "//", leaves), *_tokens(modulus, leaves), "%"]
    if isinstance(value, sympy.Not):
        return [*_tokens(value.args[0], leaves), 0, "=="]
    if isinstance(value, torch_sympy.Identity):
        return _tokens(value.args[0], leaves)
    raise BuildError(
        f"{kind.__name__} in the host expression {value} has no integer form; "
        "use + - * // % min max and comparisons of sizes and strides"
    )


def _fold(terms: tuple[sympy.Basic, ...], symbol: str, leaves: Leaves) -> Expr:
    tokens = _tokens(terms[0], leaves)
    for term in terms[1:]:
        tokens += [*_tokens(term, leaves), symbol]
    return tokens


def _sum(value: sympy.Add, leaves: Leaves) -> Expr:
    """`a - b` for a term with a negative factor, so that it reads as it was written."""
    first, *rest = sorted(_constants_last(value.args), key=_is_negative)
    tokens = _tokens(first, leaves)
    for term in rest:
        tokens += [*_tokens(-term, leaves), "-"] if _is_negative(term) else [*_tokens(term, leaves), "+"]
    return tokens


def _is_negative(term: sympy.Basic) -> bool:
    return bool(term.as_coeff_Mul()[0].is_negative)


def _constants_last(terms: tuple[sympy.Basic, ...]) -> tuple[sympy.Basic, ...]:
    return tuple(sorted(terms, key=lambda term: isinstance(term, sympy.Number)))


def depth(tokens: Expr) -> int:
    """How many values an evaluation holds at once, at most."""
    now = deepest = 0
    for token in tokens:
        now += -1 if token in OPERATORS else 1
        deepest = max(deepest, now)
    return deepest


def evaluate(tokens: Expr, sizes: Mapping[str, int]) -> int:
    """The value for a call whose leaves have these values, as the C++ core computes it.

    BuildError for a leaf without a value, a division by zero and a result outside of int64.
    """
    stack: list[int] = []
    for token in tokens:
        if isinstance(token, int):
            stack.append(token)
        elif token in OPERATORS:
            right, left = stack.pop(), stack.pop()
            if token in ("//", "%") and right == 0:
                raise BuildError(f"{render(tokens)} divides by zero for {dict(sizes)}")
            stack.append(OPERATORS[token](left, right))
        elif token in sizes:
            stack.append(sizes[token])
        else:
            raise BuildError(f"{render(tokens)} needs {token}, which is not among {sorted(sizes)}")
        if not -(2**63) <= stack[-1] < 2**63:
            raise BuildError(f"{render(tokens)} does not fit 64 bits for {dict(sizes)}")
    (value,) = stack
    return value


def render(tokens: Expr) -> str:
    """The expression in infix, for messages and guards: `(M + 15) // 16`."""
    stack: list[tuple[str, int]] = []
    for token in tokens:
        if token not in OPERATORS:
            stack.append((str(token), _ATOM))
            continue
        (right, right_binds), (left, left_binds) = stack.pop(), stack.pop()
        if token in ("min", "max"):
            stack.append((f"{token}({left}, {right})", _ATOM))
            continue
        binds = next(level for level, symbols in enumerate(_PRECEDENCE) if token in symbols)
        left = f"({left})" if left_binds < binds else left
        right = f"({right})" if right_binds <= binds else right
        stack.append((f"{left} {token} {right}", binds))
    return stack[-1][0]


def guards_of(exprs: Iterable[Expr]) -> list[Guard]:
    """Guards for these facts, each fact once: a host function's own check and a rule of the build may say the same."""
    unique = {tuple(expr): expr for expr in exprs}
    return [{"expr": expr, "text": render(expr)} for expr in unique.values()]


def divisor(value: Value, known: Mapping[sympy.Symbol, int]) -> int:
    """A number that always divides `value`, given such numbers for its symbols; 0 says that the value is always 0.

    Sound, not sharp: 1 where nothing is known.
    """
    if isinstance(value, int):
        return abs(value)
    if isinstance(value, sympy.Integer):
        return abs(int(value))
    if isinstance(value, sympy.Symbol):
        return known.get(value, 1)
    parts = [divisor(part, known) for part in value.args]
    if isinstance(value, sympy.Add) or type(value) in (sympy.Min, sympy.Max, torch_sympy.Min, torch_sympy.Max):
        return reduce(math.gcd, parts)
    if isinstance(value, sympy.Mul):
        return math.prod(parts)
    if isinstance(value, sympy.Pow) and isinstance(value.exp, sympy.Integer) and int(value.exp) >= 1:
        return int(parts[0] ** int(value.exp))
    if isinstance(value, torch_sympy.FloorDiv) and isinstance(value.args[1], sympy.Integer):
        by = abs(int(value.args[1]))
        return parts[0] // by if parts[0] % by == 0 else 1
    return 1


def turns(conditions: Iterable[sympy.Basic]) -> frozenset[int]:
    """Values at which conditions on sizes may change their truth: their constants, quotients of those, and neighbours."""
    found: set[int] = set()
    for condition in conditions:
        constants = {abs(int(number)) for number in condition.atoms(sympy.Integer)}
        found |= constants | {constant // factor for constant in constants for factor in constants - {0}}
    return frozenset(value + step for value in found for step in (-1, 0, 1))


def at(value: Value, values: Mapping[sympy.Symbol, int]) -> Value:
    """The value with some symbols replaced; an int where none is left."""
    if isinstance(value, int):
        return value
    tokens, leaves = _whole(value)
    if tokens is not None and leaves <= values.keys() and (computed := _computed(tokens, values)) is not None:
        return computed
    replaced = value.xreplace({symbol: sympy.Integer(number) for symbol, number in values.items()})
    if replaced in (sympy.true, sympy.false):
        return int(replaced is sympy.true)
    if isinstance(replaced, sympy.Integer):
        return int(replaced)
    # sympy leaves numbers such as Max(-1, 2) as they are while its evaluation is switched off.
    whole = not replaced.free_symbols and getattr(replaced, "is_integer", False)
    return evaluate(postfix(replaced, {}), {}) if whole else replaced


@functools.lru_cache(maxsize=10_000)
def _whole(value: sympy.Basic) -> tuple[list[Any] | None, frozenset[sympy.Symbol]]:
    """The value as a postfix list whose leaves are its symbols, and these; None for what is not integer arithmetic.

    A build asks for the same value at many sizes, and sympy takes 0.4 ms each time.
    """
    symbols = frozenset(value.free_symbols)
    named = {symbol.name: symbol for symbol in symbols}
    if named.keys() & OPERATORS.keys():
        return None, symbols
    try:
        tokens = postfix(value, {symbol: name for name, symbol in named.items()})
    except BuildError:
        return None, symbols
    return [named.get(token, token) for token in tokens], symbols


def _computed(tokens: Sequence[Any], values: Mapping[sympy.Symbol, int]) -> int | None:
    """A postfix list's value, of any number of bits; None where it divides by zero, which sympy has a value for."""
    stack: list[int] = []
    for token in tokens:
        if isinstance(token, int):
            stack.append(token)
        elif isinstance(token, str):
            right, left = stack.pop(), stack.pop()
            if right == 0 and token in ("//", "%"):
                return None
            stack.append(OPERATORS[token](left, right))
        else:
            stack.append(values[token])
    return stack[0]
