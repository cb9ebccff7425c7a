"""The doors, `hdispatch.ops.<op>` and `torch.ops.hdispatch.<op>`, on the null driver: the same launches."""

from __future__ import annotations

import struct

import hdispatch
import pytest
import torch
import toy
from doors import (
    DOORS,
    EPSILON,
    FULL,
    INPUT,
    RESIDUAL,
    RESULT,
    SCALE,
    SCALE_UB,
    counted,
    counts,
    replaced,
)
from hdispatch import _C
from hdispatch.testing import null

pytestmark = pytest.mark.usefixtures("bundle")


def test_positional_keyword_and_default_arguments(door):
    a = toy.arguments(4, 64, FULL)
    names = [arg.name for arg in toy.SPEC.args]
    door(*a)
    door(*a[:5])
    door(*a[:5], None)
    door(*a[:5], None, None)
    door(**dict(zip(names, a, strict=True)))
    door(**dict(reversed(list(zip(names, a, strict=True)))))
    door(*a[:3], epsilon=a[EPSILON], scale=a[SCALE])
    door(*a[:5], residual=a[RESIDUAL], scale_ub=a[SCALE_UB])
    door(*a[:4], 1)  # an int is a float
    assert counts() == counted(hits=9)


def test_every_launch_is_the_same_through_every_door():
    seen = []
    for each in DOORS.values():
        with null.recording():
            for m in (1, 2, 15, 16, 17, 1000):
                for k in (64, 512):
                    for variant in ("bfloat16", FULL):
                        args = toy.arguments(m, k, variant)
                        each(*args)
                        addresses = [args[i].data_ptr() + past for i, past in ((RESULT, 0), (INPUT, 32), (SCALE, 0))]
                        launch = null.launches()[-1]
                        assert [struct.unpack("q", p)[0] for p in launch["params"][:3]] == addresses
                        launch["params"][:3] = []
                        seen.append((each, launch))
    launches = [[launch for who, launch in seen if who is each] for each in DOORS.values()]
    assert launches[0] == launches[1] == launches[2]
    assert len(launches[0]) == 24


def test_what_is_launched():
    with null.recording():
        hdispatch.ops.toy(*replaced(EPSILON, 0.25, m=18, k=512))
        hdispatch.ops.toy(*toy.arguments(16))
        hdispatch.ops.toy(*toy.arguments(1))
    other, mult16, one = null.launches()
    assert (other["function"], other["file"]) == ("toy_kernel", "artifacts/other.cubin")
    assert (mult16["file"], one["file"]) == ("artifacts/mult16.cubin", "artifacts/one.cubin")
    assert (other["grid"], other["block"], other["shared"]) == ((5, 1, 1), (128, 1, 1), 0)
    assert (other["pdl"], other["cooperative"], other["cluster"]) == (True, False, (1, 1, 1))
    assert other["params"][3:] == [
        struct.pack("i", 512),
        struct.pack("i", 18),
        struct.pack("f", 0.25),
        struct.pack("d", 0.5),
        struct.pack("q", 18 * 512),
        b"\1",
        bytes(8),
        bytes(8),
    ]
    assert len(one["params"]) == 8 + 2  # M is compiled in


def test_without_pdl(folder):
    hdispatch.load(folder, driver="null", pdl=False)
    with null.recording():
        hdispatch.ops.toy(*toy.arguments())
    assert null.launches()[0]["pdl"] is False


def test_what_an_op_says_about_itself():
    op = hdispatch.ops.toy
    assert op.name == op.__name__ == "toy"
    assert op.schema == toy.SPEC.schema()
    assert op.fallback is toy.reference
    assert repr(op) == f"<hdispatch op {toy.SPEC.schema()}>"
    assert callable(op)
    assert type(op) is _C.Op
    with pytest.raises(TypeError):
        _C.Op()
    assert str(torch.ops.hdispatch.toy.default._schema) == "hdispatch::" + toy.SPEC.schema()
    assert torch.ops.hdispatch.toy.default._schema.is_mutable
