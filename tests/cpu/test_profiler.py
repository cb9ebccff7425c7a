"""torch.profiler shows an op's name around its launch, through every door; without one nothing is recorded."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import hdispatch
import pytest
import standin
import torch
import toy
from torch.profiler import ProfilerActivity, profile

NAME = "hdispatch::toy"


@pytest.fixture(autouse=True)
def _loaded(tmp_path):
    toy.write(tmp_path)
    bundle = hdispatch.load(tmp_path, driver="null")
    yield
    bundle.unload()


def recorded(call: Callable[[], Any], **options: Any) -> tuple[Counter[str], list[Any]]:
    """How often each name is recorded while it runs, and the events."""
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], **options) as profiler:
        call()
    return Counter(event.name for event in profiler.events()), list(profiler.events())


DOORS: dict[str, Callable[..., None]] = {
    "packet": lambda *args: hdispatch.ops.toy(*args),
    "keywords": lambda *args: hdispatch.ops.toy(**{arg.name: value for arg, value in zip(toy.SPEC.args, args, strict=True)}),
    "torch": lambda *args: torch.ops.hdispatch.toy(*args),
    "default": lambda *args: torch.ops.hdispatch.toy.default(*args),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("k", [64, 96], ids=["hit", "miss"])
def test_an_op(door, k):
    arguments = toy.arguments(4, k)
    hdispatch.stats(reset=True)
    names, events = recorded(lambda: DOORS[door](*arguments), record_shapes=True)
    assert names[NAME] == 1
    (event,) = [each for each in events if each.name == NAME]
    assert event.input_shapes[:4] == [[4, k], [4, k], [k], [4, 1]]
    counted = hdispatch.stats()["toy"]
    assert (counted["hits"], counted["fallbacks"]) == ((1, 0) if k == 64 else (0, 1))
    if k == 96:  # what the fallback does is within
        assert [each for each in events if each.name == "aten::copy_" and _within(each, event)]


def _within(inner: Any, outer: Any) -> bool:
    while inner is not None and inner is not outer:
        inner = inner.cpu_parent
    return inner is outer


@pytest.mark.parametrize("door", DOORS)
def test_an_error_ends_the_range(door):
    arguments = toy.arguments(4, 96)

    def call():
        with hdispatch.strict(), pytest.raises(hdispatch.MissError):
            DOORS[door](*arguments)
        DOORS[door](*toy.arguments(4, 64))

    names, events = recorded(call)
    first, second = (each for each in events if each.name == NAME)
    assert not _within(second, first)
    assert names[NAME] == 2


def test_only_the_thread_that_is_profiled():
    def call():
        thread = threading.Thread(target=lambda: hdispatch.ops.toy(*toy.arguments()))
        thread.start()
        thread.join()

    assert recorded(call)[0][NAME] == 0
    assert recorded(lambda: hdispatch.ops.toy(*toy.arguments()))[0][NAME] == 1
    hdispatch.ops.toy(*toy.arguments())  # after the profile has ended


@pytest.mark.parametrize("door", standin.DOORS)
def test_an_override(door):
    library = standin.Library(standin.TOY)
    with library.override():
        call = standin.DOORS[door](library.ops.toy)
        hdispatch.stats(reset=True)
        names, events = recorded(lambda: call(*toy.arguments(4, 64)), record_shapes=True)
        assert not library.calls
    assert hdispatch.stats()["toy"]["hits"] == 1
    assert names[f"{library.namespace}::toy"] == 1
    (event,) = [each for each in events if each.name == f"{library.namespace}::toy"]
    assert event.input_shapes[1] == [4, 64]


def frozen(name: str, k: int) -> Any:
    """The toy twice and a step of torch's own."""
    s = hdispatch.Sequence(name)
    result = s.slot("result", ("M", k), torch.float8_e4m3fn, written=True)
    x = s.slot("x", ("M", k), torch.bfloat16)
    scale = s.slot("scale", ("M", 1), torch.float32, written=True)
    weight = torch.ones(k, dtype=torch.bfloat16)
    s.add(hdispatch.ops.toy, result, x, weight, scale, 0.5)
    s.add_torch(torch.ops.aten.mul_.Scalar, scale, 2.0)
    s.add(hdispatch.ops.toy, result, x, weight, scale, 0.5)
    return s.freeze()


@pytest.mark.parametrize("k", [64, 96], ids=["hit", "miss"])
def test_a_sequence(k):
    sequence = frozen(f"profiled {k}", k)
    result, x, _, scale, *_ = toy.arguments(4, k)
    hdispatch.stats(reset=True)
    names, events = recorded(lambda: sequence(result, x, scale))
    assert names[NAME] == 2
    if k == 64:
        (whole,) = [each for each in events if each.name == "hdispatch::sequence profiled 64"]
        steps = [each.name for each in events if each.cpu_parent is whole]
        assert steps == [NAME, "aten::mul_", NAME]
        assert hdispatch.stats()["profiled 64"]["hits"] == 1
    names, _ = recorded(lambda: None)
    sequence(result, x, scale)  # and without a profiler again
    assert not names[NAME]
