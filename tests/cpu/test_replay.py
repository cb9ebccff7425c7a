"""Replays without a GPU: calls on CPU tensors go straight to the sequence. What replays do is tested on a GPU."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import hdispatch
import pytest
import torch
from hdispatch import Sequence, replay
from hdispatch.replay import _identity as identity
from torch.utils._python_dispatch import TorchDispatchMode


class Graph:
    """A CUDA graph that holds nothing: a capture's call runs here, and a replay does not."""

    def capture_begin(self, capture_error_mode: str) -> None:
        """As torch's."""
        assert capture_error_mode == "thread_local"

    def capture_end(self) -> None:
        """As torch's."""

    def replay(self) -> None:
        """As torch's."""


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replays take tensors of the CPU for those of a GPU."""
    stream = SimpleNamespace(cuda_stream=0, device=torch.device("cuda", 0), synchronize=lambda: None)
    monkeypatch.setattr(replay, "_device_of", lambda _slots: stream.device)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "Stream", lambda *_: stream)
    for name in ("stream", "device"):
        monkeypatch.setattr(torch.cuda, name, lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: stream)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


def doubling(name: str) -> hdispatch.Replays:
    """x -> 2 * x, which no table has to serve."""
    sequence = Sequence(name)
    x = sequence.slot("x", ("M", 4), torch.float32)
    out = sequence.slot("out", ("M", 4), torch.float32, written=True)
    sequence.add_torch(torch.ops.aten.mul.Scalar_out, x, 2, out=out)
    return hdispatch.Replays(sequence.freeze())


def test_tensors_of_a_cpu_are_never_captured():
    calls = []
    replays = hdispatch.Replays(lambda *slots: calls.append(slots))
    x = torch.ones(3)
    for _ in range(5):
        replays(x, 7, None)
    assert len(calls) == 5
    assert all(each[0] is x and each[1:] == (7, None) for each in calls)
    assert (replays.captures, replays.replays) == (0, 0)


def test_calls_that_the_sequence_would_refuse_are_no_captured_ones():
    """Equal by ==, or in the same memory, and yet an ArgumentError without replays."""
    x = torch.ones(3)
    kept = {identity(value) for value in (1, None, x)}
    assert {identity(value) for value in (1, None, x, x.detach(), x.view(3))} == kept
    for wrong in (1.0, True, 0, [1], x.to_sparse, torch.nn.Parameter(x, requires_grad=False), x._neg_view(), x[:2]):
        assert identity(wrong) not in kept
    learned = torch.ones(3, requires_grad=True)
    with torch.no_grad():
        unwatched = identity(learned)
    assert identity(learned) != unwatched


def test_modes_see_the_launches(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    class Mode(TorchDispatchMode):
        pass

    assert replay._watcher() is None
    with Mode():
        assert replay._watcher() is not None


@pytest.mark.usefixtures("on_a_gpu")
def test_a_replay_bumps_the_versions_of_what_it_writes():
    replays = doubling("versions")
    x, out, other = (torch.ones(2, 4) for _ in range(3))
    for turn in range(6):
        before = [each._version for each in (x, out, other)]
        replays(x, out)
        assert [each._version for each in (x, out, other)] == [before[0], before[1] + 1, before[2]], turn
    assert (replays.captures, replays.replays) == (1, 4)


@pytest.mark.usefixtures("on_a_gpu")
def test_a_gradient_of_what_a_replay_has_overwritten_is_refused():
    replays = doubling("gradient")
    x, out = torch.ones(2, 4), torch.ones(2, 4)
    weight = torch.ones(2, 4, requires_grad=True)
    for _ in range(4):
        replays(x, out)
    loss = (weight * out).sum()  # saves out
    replays(x, out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with torch.inference_mode():
        made = torch.ones(2, 4)
    for _ in range(4):
        replays(x, made)  # has no version, and needs none
    assert replays.captures == 2


@pytest.mark.usefixtures("on_a_gpu")
def test_replayed_calls_are_counted_as_calls_of_the_sequence():
    replays = doubling("counted")
    hdispatch.stats(reset=True)
    x, out = torch.ones(2, 4), torch.empty(2, 4)
    for calls in range(1, 8):
        replays(x, out)
        assert hdispatch.stats()["counted"] == {"hits": calls, "empty": 0, "fallbacks": 0, "misses": {}}
    assert (replays.captures, replays.replays) == (1, 5)


@pytest.mark.usefixtures("on_a_gpu")
def test_replays_are_in_the_metrics():
    metrics = pytest.importorskip("hdispatch.metrics", reason="needs prometheus_client")
    replays = doubling("measured")
    hdispatch.stats(reset=True)
    x, out = torch.ones(2, 4), torch.empty(2, 4)
    for _ in range(5):
        replays(x, out)
    (hits,) = (each for each in metrics.RuntimeCollector().collect() if each.name == "hdispatch_hits")
    assert [each.value for each in hits.samples if each.labels["op"] == "measured"] == [5]


@pytest.mark.usefixtures("on_a_gpu")
def test_slots_are_given_by_name_too():
    replays = doubling("named")
    x, out = torch.ones(2, 4), torch.empty(2, 4)
    for _ in range(2):
        replays(x, out=out)
        replays(out=out, x=x)
    assert (replays.captures, replays.replays) == (1, 2)
    assert torch.equal(out, 2 * x)
    for wrong, message in (({"out": out}, 'slot "x" is missing'), ({"x": x, "nosuch": 3}, 'no slot "nosuch"')):
        with pytest.raises(hdispatch.ArgumentError, match=message):
            replays(**wrong)


def test_slots_by_name_on_a_cpu():
    x, out = torch.ones(2, 4), torch.empty(2, 4)
    replays = doubling("named on a cpu")
    replays(out=out, x=x)
    assert torch.equal(out, 2 * x)
    assert "nothing is captured" in hdispatch.explain(replays, x, out)


@pytest.mark.usefixtures("on_a_gpu")
def test_explain_says_what_becomes_of_a_call():
    replays = doubling("explained")
    x, out = torch.ones(2, 4), torch.empty(2, 4)
    found = []
    for _ in range(4):
        found.append(hdispatch.explain(replays, x, out))
        replays(x, out)
    assert [each.split(" ")[0].rstrip(":,") for each in found] == ["launched", "launched", "captured", "replayed"]
    assert "1 captured, 1 of at most 128 graphs kept" in found[3]
    for each in found:
        assert each.partition("\n")[2] == hdispatch.explain(replays.sequence, x, out)


class Watching(TorchDispatchMode):
    """Sees every op, and changes nothing."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("on_a_gpu")
def test_explain_says_what_a_mode_or_a_capture_makes_of_a_call(monkeypatch):
    replays = doubling("watched")
    x, out = torch.ones(2, 4), torch.empty(2, 4)
    for _ in range(3):
        replays(x, out)
    assert hdispatch.explain(replays, x, out).startswith("replayed")
    with Watching():
        for each in (x, torch.ones(2, 4)):
            text = hdispatch.explain(replays, each, out)
            assert text.startswith("launched: a dispatch mode of torch's sees every op ")
            assert "\nmode     a dispatch or function mode of torch's is on: each step is a call of its own\n" in text
            replays(each, out)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    text = hdispatch.explain(replays, x, out)
    assert text.startswith("launched: a capture is under way, which gets the launches ")
    assert "\nmode " not in text
    replays(x, out)
    assert (replays.captures, replays.replays) == (1, 1)


@pytest.mark.usefixtures("on_a_gpu")
def test_explain_says_why_a_call_that_came_twice_is_not_captured(monkeypatch):
    monkeypatch.setattr(replay, "IDLE_CALLS", 4)
    ready = []
    around = SimpleNamespace(may_begin=lambda: bool(ready), is_ready=lambda: bool(ready), ended=lambda: None)
    replays = hdispatch.Replays(doubling("not captured").sequence, most=1, around=around)
    x, y, out = torch.ones(2, 4), torch.ones(2, 4), torch.empty(2, 4)

    def next_call(of: torch.Tensor) -> str:
        """What a call is said to become, which it does."""
        before = replays.captures, replays.replays
        said = hdispatch.explain(replays, of, out).partition(" (")[0]
        replays(of, out)
        did = replays.captures - before[0], replays.replays - before[1]
        assert did == {"launched": (0, 0), "captured,": (1, 1), "replayed:": (0, 1)}[said.split(" ")[0].rstrip(":")]
        return said

    assert [next_call(x).split(" ")[0] for _ in range(2)] == ["launched:"] * 2
    assert next_call(x) == "launched: what its foreign steps need for a capture is not there yet"
    ready.append(True)
    assert next_call(x).startswith("captured, then replayed")
    assert [next_call(y).split(" ")[0] for _ in range(2)] == ["launched:"] * 2
    assert next_call(y).startswith("launched: each graph that is kept was used within 4 calls")
    assert next_call(y).startswith("captured, then replayed")  # x's graph makes room
    assert next_call(x).startswith("launched")
    none_kept = hdispatch.Replays(replays.sequence, most=0)
    for _ in range(4):
        none_kept(x, out)
    assert hdispatch.explain(none_kept, x, out).startswith("launched: each graph that is kept")
    assert none_kept.captures == 0
