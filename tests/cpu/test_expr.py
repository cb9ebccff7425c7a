"""Expressions: sympy, its postfix form and its rendering say the same; proofs of divisibility are sound."""

from __future__ import annotations

import pytest
import sympy
from hdispatch.compile.expr import MAX_DEPTH, at, depth, divisor, evaluate, postfix, render, turns
from hdispatch.errors import BuildError
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._sympy.functions import CleanDiv, FloorDiv, IntTrueDiv, Max, Min, Mod, ModularIndexing

M = sympy.Symbol("m", positive=True, integer=True)
STRIDE = sympy.Symbol("s", positive=True, integer=True)
LEAVES = {M: "M", STRIDE: "input.stride(0)"}

leaf = st.one_of(st.sampled_from([M, STRIDE]), st.integers(-40, 40).map(sympy.Integer))
positive = st.integers(1, 40).map(sympy.Integer)


def grow(children):
    binary = st.sampled_from([lambda a, b: a + b, lambda a, b: a - b, lambda a, b: a * b, Min, Max])
    return st.one_of(
        st.builds(lambda f, a, b: f(a, b), binary, children, children),
        st.builds(lambda a, b: FloorDiv(a, b), children, positive),
    )


@settings(max_examples=300, deadline=None)
@given(st.recursive(leaf, grow, max_leaves=8), st.integers(1, 70000), st.integers(1, 70000))
def test_postfix_computes_what_sympy_does(value, m, stride):
    tokens = postfix(value, LEAVES)
    expected = int(value.xreplace({M: sympy.Integer(m), STRIDE: sympy.Integer(stride)}))
    assert at(value, {M: m, STRIDE: stride}) == expected
    assert at(at(value, {M: m}), {STRIDE: stride}) == expected
    assert evaluate(tokens, {"M": m, "input.stride(0)": stride}) == expected
    text = render(tokens).replace("input.stride(0)", "s")
    assert eval(text, {"min": min, "max": max, "M": m, "s": stride}) == expected


def test_values_that_no_postfix_list_computes():
    assert at(M // 1 > STRIDE, {M: 3, STRIDE: 2}) == 1
    assert at(FloorDiv(M, STRIDE), {M: 7, STRIDE: 2}) == 3
    assert at(M * STRIDE, {M: 2**62, STRIDE: 4}) == 2**64  # more than the core computes
    assert at(IntTrueDiv(M, 2), {M: 3}) == 1.5
    assert at(FloorDiv(M, STRIDE), {M: 6}) == FloorDiv(6, STRIDE)


def test_numbers_that_sympy_has_not_evaluated():
    with sympy.evaluate(False):
        value = Min(M, Max(sympy.Integer(-1), sympy.Integer(2)))
        assert at(value, {M: 3}) == 2
    assert at(value, {M: 1}) == 1


@settings(max_examples=300, deadline=None)
@given(st.recursive(leaf, grow, max_leaves=8), st.integers(1, 500), st.integers(1, 500))
def test_divisor_always_divides(value, m, stride):
    found = divisor(value, {M: 16, STRIDE: 8})
    actual = at(value, {M: 16 * m, STRIDE: 8 * stride})
    assert actual == 0 if found == 0 else actual % found == 0


@pytest.mark.parametrize(
    ("value", "tokens"),
    [
        (5, [5]),
        (FloorDiv(M + 15, 16), ["M", 15, "+", 16, "//"]),
        (M * 4096, ["M", 4096, "*"]),
        (M - 1, ["M", 1, "-"]),
        (3 - M, [3, "M", "-"]),
        (Min(M, 132), ["M", 132, "min"]),
        (Mod(M, 16), ["M", 16, "%"]),
        (M**2, ["M", "M", "*"]),
        (ModularIndexing(M, 4, 8), ["M", 4, "//", 8, "%"]),
        (CleanDiv(M, 4), ["M", 4, "//"]),
        (sympy.Le(M * STRIDE, 7), ["M", "input.stride(0)", "*", 7, "<="]),
        (sympy.And(sympy.Gt(M, 4), sympy.Ne(M, 8)), None),
        (sympy.Not(sympy.Symbol("b", integer=True) > 1, evaluate=False), None),
        (sympy.true, [1]),
    ],
)
def test_forms(value, tokens):
    leaves = LEAVES | {symbol: "K" for symbol in getattr(value, "free_symbols", ()) if symbol not in LEAVES}
    found = postfix(value, leaves)
    if tokens is None:
        for m in range(1, 12):
            known = dict.fromkeys(value.free_symbols, m)
            assert evaluate(found, dict.fromkeys(leaves.values(), m)) == at(value, known)
    else:
        assert found == tokens


def test_guards_read_as_written():
    assert render(["input.stride(0)", 16, "%", 0, "=="]) == "input.stride(0) % 16 == 0"
    assert render(["M", 15, "+", 16, "//", 1, "-"]) == "(M + 15) // 16 - 1"
    assert render(["M", "K", 2, "-", "-"]) == "M - (K - 2)"


@pytest.mark.parametrize("value", [M / 2, sympy.sqrt(M), IntTrueDiv(M, 3), M * sympy.Rational(1, 2), sympy.Float(1.5) * M])
def test_what_is_not_integer_arithmetic_is_refused_by_name(value):
    with pytest.raises(BuildError, match="has no integer form"):
        postfix(value, LEAVES)


def test_unknown_symbol_and_depth_are_refused():
    with pytest.raises(BuildError, match="no size or stride of the call"):
        postfix(sympy.Symbol("x") + M, LEAVES)
    deep = M
    for index in range(MAX_DEPTH + 1):
        deep = FloorDiv(sympy.Integer(10**9), Max(deep, index + 2) + M * (index + 3))
    with pytest.raises(BuildError, match=f"the launcher takes {MAX_DEPTH}"):
        postfix(deep, LEAVES)
    assert depth(["M", 15, "+", 16, "//"]) == 2


def test_evaluation_refuses_what_the_core_refuses():
    with pytest.raises(BuildError, match="divides by zero"):
        evaluate(["M", 0, "//"], {"M": 1})
    with pytest.raises(BuildError, match="does not fit 64 bits"):
        evaluate(["M", "M", "*"], {"M": 2**40})
    with pytest.raises(BuildError, match="needs K"):
        evaluate(["K"], {"M": 1})


@pytest.mark.parametrize(("a", "b"), [(-7, 2), (7, -2), (-7, -2), (7, 2)])
def test_division_floors_as_python(a, b):
    assert evaluate([a, b, "//"], {}) == a // b
    assert evaluate([a, b, "%"], {}) == a % b


def test_turns_hold_every_value_at_which_a_comparison_changes():
    assert {6, 7, 8} <= turns([sympy.Ne(M, 7)])
    assert {127, 128, 129} <= turns([sympy.Le(M, 128)])
    assert {16383, 16384, 16385} <= turns([sympy.Ne(64 * M, 1048576)])
    assert turns([]) == frozenset()
