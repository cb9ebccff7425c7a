"""Bad input through every door: an error that names the argument, nothing written, and the process lives on."""

from __future__ import annotations

import dataclasses
from typing import Any

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
    WEIGHT,
    bf16,
    counted,
    counts,
    f8,
    replaced,
    snapshot,
)

pytestmark = pytest.mark.usefixtures("bundle")


BAD = {
    "input of another dtype": (INPUT, torch.zeros(4, 64), "input has dtype float32; it takes bfloat16 or float16"),
    "input complex": (INPUT, torch.zeros(4, 64, dtype=torch.complex64), "input has dtype other"),
    "weight of the other dtype": (WEIGHT, torch.zeros(64, dtype=torch.float16), "no variant takes this combination of dtypes"),
    "result of another dtype": (
        RESULT,
        torch.zeros(4, 64, dtype=torch.uint8),
        "result has dtype uint8; it takes float8_e4m3fn",
    ),
    "scale of another dtype": (SCALE, torch.zeros(4, 1, dtype=torch.float64), "scale has dtype float64; it takes float32"),
    "scale_ub of another dtype": (SCALE_UB, torch.ones(1).bfloat16(), "scale_ub has dtype bfloat16; it takes float32"),
    "input of rank 1": (INPUT, bf16(64), r"input has rank 1 \(sizes \[64\]\); it takes rank 2, \[M, K\]"),
    "input of rank 3": (INPUT, bf16(2, 2, 64), r"input has rank 3 \(sizes \[2, 2, 64\]\)"),
    "input of rank 0": (INPUT, bf16(()), r"input has rank 0 \(sizes \[\]\)"),
    "input of rank 9": (INPUT, bf16(1, 1, 1, 1, 1, 1, 1, 4, 64), r"input has rank 9 \(sizes \[1, 1, 1, 1, \.\.\.\]\)"),
    "scale of rank 1": (SCALE, torch.zeros(4), "scale has rank 1"),
    "columns that are not contiguous": (INPUT, bf16(4, 128)[:, ::2], r"input has stride\(1\) = 2 .* call .contiguous\(\)"),
    "transposed": (INPUT, bf16(64, 4).t(), r"input has stride\(1\) = 4"),
    "weight that is not contiguous": (WEIGHT, bf16(128)[::2], r"weight has stride\(0\) = 2"),
    "weight repeated": (WEIGHT, bf16(1).expand(64), r"weight has stride\(0\) = 0"),
    "result in rows that are apart": (
        RESULT,
        f8(4, 128)[:, :64],
        r"result has stride\(0\) = 128 .* it takes 64 \(contiguous\)",
    ),
    "result in rows that overlap": (RESULT, f8(1, 64).expand(4, 64), r"result has stride\(0\) = 0"),
    "residual in rows that overlap": (RESIDUAL, bf16(1, 64).expand(4, 64), r"residual has stride\(0\) = 0"),
    "scale repeated": (SCALE, torch.zeros(1, 1).expand(4, 1), r"scale has stride\(0\) = 0"),
    "weight too short": (WEIGHT, bf16(63), r"weight has size\(0\) = 63; it takes 64 \(\[K\] with K = 64\)"),
    "weight too long": (WEIGHT, bf16(65), r"weight has size\(0\) = 65"),
    "result too small": (RESULT, f8(3, 64), r"result has size\(0\) = 3; it takes 4 \(\[M, K\] with M = 4\)"),
    "result too narrow": (RESULT, f8(4, 63), r"result has size\(1\) = 63; it takes 64"),
    "result empty": (RESULT, f8(0, 64), r"result has size\(0\) = 0; it takes 4"),
    "scale too small": (SCALE, torch.zeros(3, 1), r"scale has size\(0\) = 3; it takes 4"),
    "scale of two columns": (SCALE, torch.zeros(4, 2), r"scale has size\(1\) = 2; it takes 1"),
    "scale_ub of two": (SCALE_UB, torch.ones(2), r"scale_ub has size\(0\) = 2; it takes 1"),
    "residual of another shape": (RESIDUAL, bf16(5, 64), r"residual has size\(0\) = 5; it takes 4"),
    "input on meta": (INPUT, bf16(4, 64, device="meta"), "result is on cpu; another argument is a meta tensor"),
    "result on meta": (RESULT, f8(4, 64).to("meta"), "input is on cpu; another argument is a meta tensor"),
    "input absent": (INPUT, None, r"input is None; it takes a tensor \[M, K\]"),
    "result absent": (RESULT, None, "result is None"),
    "epsilon negative": (EPSILON, -1e-30, "epsilon is -1e-30; it takes a finite float32 of at least 0"),
    "epsilon NaN": (EPSILON, float("nan"), "epsilon is nan"),
    "epsilon infinite": (EPSILON, float("inf"), "epsilon is inf"),
    "epsilon minus infinite": (EPSILON, float("-inf"), "epsilon is -inf"),
    "epsilon beyond float32": (EPSILON, 1e39, "epsilon is 1e"),
    "epsilon a large int": (EPSILON, 10**39, "epsilon is 1e"),
    "input requires grad": (
        INPUT,
        bf16(4, 64, requires_grad=True),
        r"input requires grad and grad mode is on; .* input.detach\(\)",
    ),
    "result requires grad": (SCALE, torch.zeros(4, 1, requires_grad=True), "scale requires grad"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(door, case):
    index, value, words = BAD[case]
    variant = FULL if index in (SCALE_UB, RESIDUAL) else "bfloat16"
    args = replaced(index, value, variant=variant)
    before = snapshot(args)
    with pytest.raises(hdispatch.ArgumentError, match=f"toy: {words}"):
        door(*args)
    assert snapshot(args) == before
    assert counts() == counted()
    door(*toy.arguments())
    assert counts() == counted(hits=1)


# What is not of a type that torch's own parser takes: torch words it where the call is torch's own.
NOT_EVEN = {
    "epsilon text": (EPSILON, "1e-6", "epsilon is a str; it takes a float"),
    "epsilon absent": (EPSILON, None, "epsilon is a NoneType; it takes a float"),
    "epsilon beyond any float": (EPSILON, 10**400, "epsilon is an int that no float holds"),
    "epsilon complex": (EPSILON, 1j, "epsilon is a complex; it takes a float"),
    "input a list": (INPUT, [[1.0]], "input is a list; it takes a tensor"),
    "input text": (INPUT, "x", "input is a str; it takes a tensor"),
    "input a number": (INPUT, 1.0, "input is a float; it takes a tensor"),
    "input an array": (INPUT, torch.zeros(4, 64).numpy(), "input is a numpy.ndarray; it takes a tensor"),
    "scale_ub a number": (SCALE_UB, 448.0, "scale_ub is a float; it takes a tensor"),
    "result an op": (RESULT, hdispatch.ops.toy, "result is a hdispatch._C.Op; it takes a tensor"),
}


@pytest.mark.parametrize("case", NOT_EVEN)
def test_what_is_no_argument_at_all(door, case):
    index, value, words = NOT_EVEN[case]
    args = replaced(index, value)
    before = snapshot(args)
    if door is DOORS["torch.ops default"]:
        expected: Any = pytest.raises(RuntimeError, match=f"for argument '{toy.SPEC.args[index].name}'")
    else:
        expected = pytest.raises(hdispatch.ArgumentError, match=f"toy: {words}")
    with expected:
        door(*args)
    assert snapshot(args) == before
    assert counts() == counted()


@pytest.mark.parametrize("name", ["hdispatch.ops", "torch.ops"])
def test_a_flag_or_a_tensor_is_no_float(name):
    for value, kind in ((True, "bool"), (torch.tensor(1.0), "Tensor")):
        with pytest.raises(hdispatch.ArgumentError, match=f"epsilon is a {kind}; it takes a float"):
            DOORS[name](*replaced(EPSILON, value))


@pytest.mark.parametrize(
    ("positional", "keywords", "words"),
    [
        (3, {}, 'argument "scale" is missing'),
        (4, {}, 'argument "epsilon" is missing'),
        (0, {}, 'argument "result" is missing'),
        (5, {"eps": 1.0}, 'has no argument "eps"'),
        (5, {"": 1.0}, 'has no argument ""'),
        (5, {"\ud800": 1.0}, 'has no argument "?"'),
        (5, {"result": None}, 'argument "result" is given twice'),
        (7, {"residual": None}, 'argument "residual" is given twice'),
        (8, {}, "got 8 positional arguments; it takes 7"),
        (100, {}, "got 100 positional arguments; it takes 7"),
    ],
)
def test_wrong_sets_of_arguments(door, positional, keywords, words):
    args = (toy.arguments(4, 64, FULL) + [None] * 100)[:positional]
    if door is DOORS["torch.ops default"]:
        with pytest.raises((RuntimeError, UnicodeEncodeError)):  # torch's own words
            door(*args, **keywords)
    else:
        with pytest.raises(hdispatch.ArgumentError) as caught:
            door(*args, **keywords)
        assert words in str(caught.value)
        assert toy.SPEC.schema() in str(caught.value) or "twice" in words
    assert counts() == counted()


def test_errors_are_of_the_right_kind():
    with pytest.raises(ValueError, match="epsilon"):
        hdispatch.ops.toy(*replaced(EPSILON, -1.0))
    with pytest.raises(hdispatch.HdispatchError):
        hdispatch.ops.toy(*replaced(EPSILON, -1.0))
    with pytest.raises(RuntimeError):
        hdispatch.ops.toy(*replaced(EPSILON, -1.0))


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_a_fallback_that_raises(kind):
    def reference(*_: object) -> None:
        raise kind("from the fallback")

    name = f"toy_{kind.__name__}"
    hdispatch.registry.define(dataclasses.replace(toy.SPEC, name=name, reference=reference))
    packet = getattr(torch.ops.hdispatch, name)
    for each in (getattr(hdispatch.ops, name), packet, packet.default):
        with pytest.raises(kind):
            each(*toy.arguments())
        assert hdispatch.stats(reset=True)[name]["fallbacks"] == 1
