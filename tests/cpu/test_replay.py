"""Replays without a GPU: calls on CPU tensors go straight to the sequence. What replays do is tested on a GPU."""

from __future__ import annotations

import hdispatch
import torch


def test_tensors_of_a_cpu_are_never_captured():
    calls = []
    replays = hdispatch.Replays(lambda *slots: calls.append(slots), "on the CPU")
    x = torch.ones(3)
    for _ in range(5):
        replays(x, 7, None)
    assert len(calls) == 5
    assert all(each[0] is x and each[1:] == (7, None) for each in calls)
    assert (replays.captures, replays.replays) == (0, 0)
