"""Holding JSON against declarations: what is accepted, and the path and words of what is not."""

from __future__ import annotations

import json
from typing import Any, Literal, NotRequired, TypedDict

import pytest
from hdispatch.typed_json import MOST_NESTED, Mismatch, check, parse


class Point(TypedDict):
    """A declaration of every kind."""

    x: int
    name: NotRequired[str]
    colour: Literal["red", "blue"]
    tokens: list[int | str]
    free: Any
    weights: dict[str, float]
    on: bool


class Shape(TypedDict):
    """One inside another."""

    points: list[Point]


def point(**changes: Any) -> dict[str, Any]:
    return {"x": 1, "colour": "red", "tokens": [1, "a"], "free": None, "weights": {"a": 1.5}, "on": True, **changes}


@pytest.mark.parametrize(
    "value",
    [point(), point(name="n"), point(free=[{}]), point(tokens=[]), point(weights={"a": 1}), point(x=-(2**63)), point(more=1)],
)
def test_accepted(value):
    check({"points": [value, value]}, Shape)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (point(x="1"), ".x is '1', of type str; it takes int"),
        (point(x=True), ".x is True, of type bool; it takes int"),
        (point(x=1.0), ".x is 1.0, of type float; it takes int"),
        (point(x=2**63), ".x is 9223372036854775808; integers fit 64 bits"),
        (point(x=10**5000), "; integers fit 64 bits"),
        (point(name=None), ".name is None, of type NoneType; it takes str"),
        (point(colour="green"), ".colour is 'green'; it takes one of red, blue"),
        (point(colour=["red"]), ".colour is ['red']; it takes one of red, blue"),
        (point(tokens=[1, 2.5]), ".tokens[1] is 2.5; it takes int | str"),
        (point(tokens=[True]), ".tokens[0] is True; it takes int | str"),
        (point(tokens="ab"), ".tokens is 'ab', of type str; it takes list"),
        (point(weights={"a": "b"}), ".weights['a'] is 'b', of type str; it takes float"),
        (point(weights={"a": False}), ".weights['a'] is False, of type bool; it takes float"),
        (point(weights=[]), ".weights is [], of type list; it takes dict"),
        (point(on=1), ".on is 1, of type int; it takes bool"),
        (None, " is None, of type NoneType; it takes dict"),
        ({}, ".x is missing"),
        (point(x="y" * 200), "'" + "y" * 76 + "..., of type str"),
    ],
)
def test_refused(value, words):
    with pytest.raises(Mismatch) as caught:
        check({"points": [point(), value]}, Shape)
    assert str(caught.value).startswith(".points[1]")
    assert words in str(caught.value)


def test_words_of_a_union_do_not_depend_on_which_was_first():
    for kind in (str | int, int | str, list[str | int], list[int | str]):
        with pytest.raises(Mismatch, match=r"is 1.5; it takes int \| str$"):
            check([1.5] if kind in (list[int | str], list[str | int]) else 1.5, kind)


def test_a_declaration_of_another_kind():
    with pytest.raises(TypeError, match="is not one that a declaration may hold"):
        check(1, tuple[int])


class Cat(TypedDict):
    """One of two, told apart by `kind`."""

    kind: Literal["cat"]
    lives: int


class Dog(TypedDict):
    """The other."""

    kind: Literal["dog"]
    bark: str


def test_a_union_of_typed_dicts_is_told_apart_by_its_tag():
    check([{"kind": "cat", "lives": 9}, {"kind": "dog", "bark": "wow"}], list[Cat | Dog])
    for value, words in (
        ({"kind": "cat", "bark": "wow"}, "[0].lives is missing"),
        ({"kind": "cow"}, "[0].kind is 'cow'; it takes one of cat, dog"),
        ({"kind": ["cat"]}, "[0].kind is ['cat']; it takes one of cat, dog"),
        ({"lives": 9}, "[0].kind is missing"),
        (7, "[0] is 7, of type int; it takes dict"),
    ):
        with pytest.raises(Mismatch) as caught:
            check([value], list[Cat | Dog])
        assert str(caught.value) == words


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_floats_are_finite(value):
    with pytest.raises(Mismatch, match=r"\.weights\['a'\] is -?(nan|inf); floats are finite"):
        check(point(weights={"a": value}), Point)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "a": 1}', r"^ repeats the name 'a'"),
        ('{"b": [0, {"c": {"a": 1, "x": 0, "a": 2}}]}', r"^\.b\[1\]\.c repeats the name 'a'"),
        ("[" * 100_000, f"^ is nested deeper than {MOST_NESTED}"),
        ("[" * 70 + "]" * 70, f"nested deeper than {MOST_NESTED}"),
        (r'{"a": ["\ud800"]}', "half of a character"),
    ],
)
def test_nothing_is_lost_in_parsing(text, message):
    with pytest.raises(Mismatch, match=message):
        parse(text)


def test_parsing_is_json_otherwise():
    deep = "[" * MOST_NESTED + "]" * MOST_NESTED
    for text in ('{"a": {"a": [1, 1.5, null, "x"]}, "b": {"a": 2}}', "3", deep):
        assert parse(text) == json.loads(text)
    with pytest.raises(ValueError, match="Expecting"):
        parse("{")
