"""An attempt: a call of an op that says whether the table served it, and leaves everything alone where it did not."""

from __future__ import annotations

import threading

import hdispatch
import pytest
import torch
import toy
from doors import EPSILON, INPUT, RESULT, WEIGHT, counted, counts, snapshot
from hdispatch import _C

pytestmark = pytest.mark.usefixtures("bundle")
ATTEMPT = _C.make_attempt(toy.OP)


def refused(args, reason):
    """The call is not served, nothing is written, and the miss is counted by that reason."""
    hdispatch.stats(reset=True)
    before = snapshot(args)
    assert ATTEMPT(*args) is False
    assert snapshot(args) == before
    assert counts() == counted(**{reason: 1})


def test_a_call_with_a_row_is_served():
    args = toy.arguments(4, 64)
    version = args[RESULT]._version
    assert ATTEMPT(*args) is True
    assert counts() == counted(hits=1)
    assert args[RESULT]._version == version + 1
    assert args[INPUT]._version == 0


def test_defaults_and_keywords():
    *given, epsilon, _, _ = toy.arguments(4, 64)
    assert ATTEMPT(*given, epsilon=epsilon) is True
    with pytest.raises(hdispatch.ArgumentError, match="epsilon"):
        ATTEMPT(*given)


def test_no_rows_are_done():
    assert ATTEMPT(*toy.arguments(0, 64)) is True
    assert counts() == counted(empty=1)


def test_no_row_of_the_size():
    args = toy.arguments(4, 128)
    hdispatch.stats(reset=True)
    before = snapshot(args)
    assert ATTEMPT(*args) is False
    assert snapshot(args) == before
    assert counts()["hits"] == 0
    assert sum(counts()["misses"].values()) == 1


def test_wrong_arguments_are_misses():
    for index, wrong, reason in (
        (WEIGHT, torch.zeros(64), "override: weight: dtype"),
        (WEIGHT, torch.zeros(65).bfloat16(), "override: weight: size"),
        (RESULT, torch.zeros(4, 64, 1).to(torch.float8_e4m3fn), "override: result: rank"),
        (EPSILON, -1.0, "override: epsilon: value"),
        (EPSILON, "a", "override: toy: epsilon is a str; it takes a float"),
    ):
        args = toy.arguments(4, 64)
        args[index] = wrong
        hdispatch.stats(reset=True)
        assert ATTEMPT(*args) is False
        assert counts()["misses"] == {reason: 1}


def test_a_gradient_is_a_miss_while_grad_mode_is_on():
    args = toy.arguments(4, 64)
    args[INPUT].requires_grad_()
    refused(args, "override: an argument requires grad")
    with torch.no_grad():
        assert ATTEMPT(*args) is True


def test_subclasses_and_modes_are_misses():
    class Mine(torch.Tensor):
        pass

    args = toy.arguments(4, 64)
    args[INPUT] = args[INPUT].as_subclass(Mine)
    refused(args, "override: an argument is not a plain CPU or CUDA tensor")
    args = toy.arguments(4, 64)
    hdispatch.stats(reset=True)
    with torch.overrides.BaseTorchFunctionMode():
        assert ATTEMPT(*args) is False
    assert counts()["misses"] == {"override: a dispatch or function mode is on": 1}


def test_meta_tensors_are_misses():
    args = [x.to("meta") if isinstance(x, torch.Tensor) else x for x in toy.arguments(4, 64)]
    refused(args, "override: an argument is not a plain CPU or CUDA tensor")


def test_strict_mode_raises_for_a_miss():
    args = toy.arguments(4, 64)
    args[WEIGHT] = args[WEIGHT].float()
    with hdispatch.strict():
        with pytest.raises(hdispatch.MissError, match=r"toy: not served: .*weight"):
            ATTEMPT(*args)
        assert ATTEMPT(*toy.arguments(4, 64)) is True


def test_without_a_bundle_nothing_is_served(bundle):
    bundle.unload()
    args = toy.arguments(4, 64)
    before = snapshot(args)
    assert ATTEMPT(*args) is False
    assert snapshot(args) == before
    assert counts()["fallbacks"] == 1


def test_the_profiler_sees_it():
    with torch.profiler.profile() as profile:
        assert ATTEMPT(*toy.arguments(4, 64)) is True
    assert "hdispatch::toy" in {event.name for event in profile.events()}


def test_from_many_threads():
    found = []

    def call():
        found.append(all(ATTEMPT(*toy.arguments(4, 64)) for _ in range(200)))

    threads = [threading.Thread(target=call) for _ in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert found == [True] * 4
    assert counts() == counted(hits=800)


def test_only_of_an_op():
    with pytest.raises(TypeError, match="expected an hdispatch op"):
        _C.make_attempt(print)
