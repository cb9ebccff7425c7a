"""Definitions of ops: what is refused, buckets, hashes, copies."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import hdispatch
import pytest
import toy
from hdispatch import _C
from hdispatch.ladders import bucket_index

pytestmark = pytest.mark.usefixtures("bundle")


def test_definitions_that_are_refused():
    define = hdispatch.registry.define
    with pytest.raises(hdispatch.HdispatchError, match="op 'toy' is defined already"):
        define(toy.SPEC)
    for name in ("", "a-b", "1a", "class", "a.b", "_private", "a b"):
        with pytest.raises(hdispatch.HdispatchError, match="is not a name that Python and torch's schemas take"):
            dataclasses.replace(toy.SPEC, name=name)
    with pytest.raises(hdispatch.HdispatchError, match="no op 'nobody'; there are"):
        hdispatch.registry.spec("nobody")
    with pytest.raises(AttributeError, match="hdispatch has no op 'nobody'; it has"):
        hdispatch.ops.nobody  # noqa: B018
    assert "toy" in hdispatch.registry.names()


def test_ops_holds_ops_and_nothing_else():
    public = {name: value for name, value in vars(hdispatch.ops).items() if not name.startswith("_")}
    assert all(isinstance(value, (_C.Op, _C.FunctionalOp)) for value in public.values())
    assert set(public) == set(hdispatch.registry.names())


def test_python_and_the_core_agree_on_buckets():
    for ladder in ([1], [1, 2, 4, 8, 16], [5, 100, 101], list(range(1, 65))):
        for m in (*range(1, 130), 10**9):
            assert _C.bucket(ladder, m) == bucket_index(ladder, m)


def test_hashes_of_neighbours_differ():
    assert _C.key_hash(0, 0, 512, 0, 3) != _C.key_hash(0, 0, 513, 0, 3)
    assert _C.key_hash(0, 0, 512, 0, 3) == _C.key_hash(op=0, variant=0, k=512, n=0, bucket=3)


def test_copies_of_an_op_are_the_op():
    """A module that holds one can be copied and pickled."""
    assert copy.deepcopy(hdispatch.ops.toy) is hdispatch.ops.toy
    assert pickle.loads(pickle.dumps(hdispatch.ops.toy)) is hdispatch.ops.toy
    with pytest.raises(hdispatch.HdispatchError, match="no op 'nothing'"):
        hdispatch.registry.get("nothing")
