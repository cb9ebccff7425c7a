"""Replays without a GPU: calls on CPU tensors go straight to the sequence. What replays do is tested on a GPU."""

from __future__ import annotations

import hdispatch
import torch
from hdispatch.replay import _identity as identity
from hdispatch.replay import _is_watched as is_watched
from torch.utils._python_dispatch import TorchDispatchMode


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

    assert not is_watched()
    with Mode():
        assert is_watched()
