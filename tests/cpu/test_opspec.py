"""Declarations of ops: schemas, variants, sizes, and what is refused."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
import toy
from hdispatch import HdispatchError
from hdispatch.ladders import bucket_index
from hdispatch.opspec import FloatArg, Form, TensorArg, VllmOp, parse_dim

SPEC = toy.SPEC
X = TensorArg("x", ("M", "K"), (torch.float32,))


def declare(*args: TensorArg | FloatArg, **changes: object) -> None:
    dataclasses.replace(SPEC, name="other", args=args, **changes)


def test_the_schema():
    assert SPEC.schema() == (
        "toy(Tensor(a!) result, Tensor input, Tensor weight, Tensor(b!) scale, float epsilon, "
        "Tensor? scale_ub=None, Tensor(c!)? residual=None) -> ()"
    )
    # Only trailing optional arguments have a default.
    optional = dataclasses.replace(X, name="y", optional=True)
    assert dataclasses.replace(SPEC, args=(X, optional, FloatArg("e"))).schema() == "toy(Tensor x, Tensor? y, float e) -> ()"


def test_the_variants():
    variants = SPEC.variants()
    assert [v.name for v in variants] == [
        dtype + optional
        for optional in ("", "+residual", "+scale_ub", "+scale_ub+residual")
        for dtype in ("bfloat16", "float16")
    ]
    assert len({(tuple(sorted(map(str, v.dtypes.items()))), v.none) for v in variants}) == 8
    some = SPEC.variant("float16+residual")
    assert some.none == {"scale_ub"}
    assert some.dtypes == {
        "result": torch.float8_e4m3fn,
        "input": torch.float16,
        "weight": torch.float16,
        "scale": torch.float32,
        "residual": torch.float16,
    }
    with pytest.raises(HdispatchError, match="toy has no variant 'float64'; it has"):
        SPEC.variant("float64")
    assert SPEC.variant("float16+residual") is some, "made once"
    variants.clear()
    assert len(SPEC.variants()) == 8, "each caller has a list of its own"
    assert len(dataclasses.replace(SPEC, args=(X,)).variants()) == 1, "another spec has others"


def test_sizes():
    sizes = {"M": 3, "K": 64}
    assert [SPEC.tensor_sizes(arg, sizes) for arg in SPEC.tensors()] == [[3, 64], [3, 64], [64], [3, 1], [1], [3, 64]]
    assert SPEC.tensor_sizes(TensorArg("y", ("M", "2*N"), (torch.float32,)), {"M": 3, "N": 5}) == [3, 10]


def test_dimensions():
    assert parse_dim(4) == (4, None, 1)
    assert parse_dim("M") == (1, "M", 1)
    assert parse_dim("2*N") == (2, "N", 1)
    assert parse_dim("K/128") == (1, "K", 128)
    assert parse_dim("2*K/group_size") == (2, "K", "group_size")
    assert parse_dim("*") == (1, "*", 1)
    for wrong in ("", "L", "m", "2M", "0*M", "-1*M", "2*", "M*2", "1.5*M", "2*2*M", "K/", "K/0", "K/-1", "*/2", "K/1.5"):
        with pytest.raises(HdispatchError, match=re.escape(f"dimension {wrong!r} is not SYMBOL, FACTOR*SYMBOL")):
            parse_dim(wrong)


def test_buckets():
    assert [bucket_index((1, 4, 16), m) for m in (1, 2, 4, 5, 16, 17, 1000)] == [0, 1, 1, 2, 2, 2, 2]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((X, X), "argument names repeat"),
        ((X, TensorArg("y", ("M",), "z")), "y has the dtype of 'z', no tensor that lists dtypes"),
        ((X, TensorArg("y", ("M",), "y")), "y has the dtype of 'y', no tensor that lists dtypes"),
        ((X, FloatArg("e"), TensorArg("y", ("M",), "e")), "y has the dtype of 'e', no tensor"),
        ((X, TensorArg("y", ("L",), "x")), "dimension 'L'"),
        ((X, TensorArg("y", ("N/2",), "x")), r"no tensor carries the sizes \['N'\] plainly"),
        ((X, TensorArg("y", ("K/group",), "x")), "'group' is no integer argument with values"),
        ((TensorArg("x", ("M",), (torch.float32,), optional=True),), "only x, which may be None, carries M"),
        ((TensorArg("x", ("K",), (torch.float32,)),), r"sizes \['M'\]"),
        ((FloatArg("e"),), r"sizes \['M'\]"),
        ((dataclasses.replace(X, name="class"),), "'class' is not a name"),
        ((dataclasses.replace(X, name=""),), "'' is not a name"),
        ((dataclasses.replace(X, multiple=16),), "x has multiple 16; it takes 1, with the layout 'any' 16 too"),
        ((dataclasses.replace(X, layout="any", multiple=8),), "x has multiple 8"),
    ],
)
def test_refused_arguments(args, words):
    with pytest.raises(HdispatchError, match=words):
        declare(*args)


SLOTS = TensorArg("slots", ("M",), (torch.int64,))
PAGES = TensorArg("pages", ("*", "K"), (torch.float32,), mutated=True)
MAYBE = TensorArg("maybe", ("M",), (torch.int64,), optional=True)


@pytest.mark.parametrize(
    ("served", "words"),
    [
        ({"padded": ("pages",), "rows": "slots"}, "padded='pages' of the dimensions ('*', 'K'); it takes tensors whose first "),
        ({"padded": ("x", "nosuch"), "rows": "slots"}, "padded='nosuch'; it takes tensors whose first dimension is M, of ['x'"),
        ({"padded": ("e",), "rows": "slots"}, "padded='e'; it takes"),
        ({"padded": ("slots",), "rows": "slots"}, "padded='slots' of the dimensions ('M',); it takes"),
        ({"padded": ("x",), "rows": "pages"}, "rows='pages' of the dimensions ('*', 'K'); it takes a tensor that is always"),
        ({"padded": ("x",), "rows": "maybe"}, "rows='maybe' of the dimensions ('M',); it takes a tensor that is always there"),
        ({"padded": ("x",), "rows": "nosuch"}, "rows='nosuch'; it takes a tensor"),
        ({"padded": ("x",)}, "padded=('x',) and rows=None; it takes both"),
        ({"rows": "slots"}, "padded=() and rows='slots'; it takes both"),
        ({"padded": "x", "rows": "slots"}, "padded='x'; it takes a tuple"),
        ({"forms": (Form("slots", "rows"),)}, "a form of 'slots'; it takes a matrix, one of ['x', 'pages']"),
        ({"forms": (Form("x", "diagonal"),)}, "the form 'diagonal'; it takes one of ('rows', 'columns', "),
        ({"forms": (Form("x", "rows", flag="e"),)}, "the flag 'e'; it takes one of []"),
    ],
)
def test_what_an_op_of_vllms_names_is_there(served, words):
    with pytest.raises(HdispatchError, match=re.escape(words)):
        declare(X, SLOTS, PAGES, MAYBE, FloatArg("e"), vllm=VllmOp("other", **served))


def test_an_op_of_vllms_may_have_padded_tensors():
    declare(X, SLOTS, PAGES, vllm=VllmOp("other", (Form("x", "rows"),), padded=("x",), rows="slots"))


@pytest.mark.parametrize("ladder", [(), (0, 1), (-1,), (4, 2), (2, 2)])
def test_refused_ladders(ladder):
    with pytest.raises(HdispatchError, match="is not a list of ascending edges of at least 1"):
        declare(X, ladder=ladder)


def test_a_row_has_the_sizes_of_its_variant():
    other = TensorArg("y", ("M", "N"), "x", optional=True)
    spec = dataclasses.replace(SPEC, name="other", args=(X, other))
    assert spec.row_shape("any+y", {"K": 64, "N": 8}) == {"K": 64, "N": 8}
    assert spec.row_shape("any", {"K": 64, "N": 8}) == {"K": 64}
