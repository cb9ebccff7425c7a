"""Timing launches: how many buffers rotate, and how candidates take turns. No GPU."""

from __future__ import annotations

import random

from hdispatch.testing import device_timer


def test_rotation_exceeds_twice_l2():
    assert device_timer.rotation_count(2**30) == 1
    assert device_timer.rotation_count(10 * 2**20) == 13
    assert device_timer.rotation_count(1) == 64
    assert device_timer.rotation_count(0) == 64
    assert device_timer.rotation_count(50 * 2**20, cap_bytes=100 * 2**20) == 2
    assert device_timer.rotation_count(2**40) == 1


def test_interleaving_is_in_random_order_and_drops_losers():
    calls: list[str] = []

    class Named:
        def __init__(self, name: str, us: float) -> None:
            self.name, self.us = name, us

        def time(self, replays: int = 1) -> float:
            calls.append(self.name)
            return self.us * replays

    replays = {name: Named(name, us) for name, us in (("a", 1.0), ("b", 1.04), ("c", 1.2), ("d", 3.0))}
    times = device_timer.interleave(replays, 6, random.Random(0), {2: 1.25, 4: 1.05})
    assert {name: len(each) for name, each in times.items()} == {"a": 6, "b": 6, "c": 4, "d": 2}
    assert sorted(calls[:4]) == sorted(calls[4:8]) == ["a", "b", "c", "d"]
    assert calls[:4] != calls[4:8]
    assert {len(each) for each in device_timer.interleave(replays, 3, random.Random(0)).values()} == {3}
    assert device_timer.interleave({}, 3, random.Random(0)) == {}
    assert device_timer.interleave({"a": Named("a", 1.0)}, 2, random.Random(0), in_a_row=4) == {"a": [4.0, 4.0]}
