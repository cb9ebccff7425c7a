"""Sequences with threads, processes, locks, arenas and modes."""

from __future__ import annotations

import os
import threading
import time

import hdispatch
import pytest
import torch
from hdispatch import ArgumentError, Key
from sequence_op import (
    GATED,
    NAME,
    OP,
    PLAIN,
    K,
    block,
    block_one_by_one,
    check,
    poisoned,
    random,
    stats,
)

pytestmark = pytest.mark.usefixtures("nothing_serves")


def test_threads_have_arenas_of_their_own(served):
    sequence = block("threads")
    faults: list[str] = []

    def work(seed: int) -> None:
        try:
            for i in range(150):
                check(sequence, 1 + (i + seed) % 7, 1 + i % 3, seed)
        except BaseException as error:
            faults.append(repr(error))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    assert stats("threads") == {"hits": 600, "empty": 0, "fallbacks": 0, "misses": {}}


def test_tables_change_while_threads_call(served, sequence_functions):
    sequence = block("swapped")
    stop = threading.Event()
    faults: list[str] = []

    def work(seed: int) -> None:
        x, out, twice = random(3, K, seed=seed), poisoned(3, K), poisoned(3, K)
        block_one_by_one(x, twice, 2)
        try:
            while not stop.is_set():
                sequence(x, out, 2)
                if not torch.equal(out, twice):
                    raise AssertionError("another result")
        except BaseException as error:
            faults.append(repr(error))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(40):
        hdispatch.register(OP, Key(PLAIN), sequence_functions.scale, driver="null").unregister()
        time.sleep(0.002)
    stop.set()
    for thread in threads:
        thread.join()
    assert not faults


def test_the_lock_is_given_away(sequence_functions):
    for variant in (PLAIN, GATED):
        hdispatch.register(OP, Key(variant), sequence_functions.nap, args=[], stream="none", driver="null")
    sequence = block("nap")
    ticks, stop = 0, threading.Event()

    def count() -> None:
        nonlocal ticks
        while not stop.is_set():
            time.sleep(0.005)
            ticks += 1

    thread = threading.Thread(target=count)
    thread.start()
    before = ticks
    sequence(random(1, K), poisoned(1, K), 1)  # 5 naps of 0.3 s
    during = ticks - before
    stop.set()
    thread.join()
    assert during > 60


def test_a_forked_child_goes_on(served):
    sequence = block("forked")
    check(sequence, 4)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            check(sequence, 4)
            check(sequence, 5)
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0


def test_modes_see_every_op(served):
    from torch.utils._python_dispatch import TorchDispatchMode

    seen: list[str] = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    sequence = block("modes")
    x, out, expected = random(4, K), poisoned(4, K), poisoned(4, K)
    with Mode():
        sequence(x, out, 2)
    block_one_by_one(x, expected, 2)
    assert torch.equal(out, expected)
    assert seen.count(f"hdispatch.{NAME}.default") == 5
    assert stats("modes")["misses"] == {}


def test_versions_of_what_is_written(served):
    sequence = block("versions")
    x, out = random(4, K), poisoned(4, K)
    before = x._version, out._version
    sequence(x, out, 2)
    assert x._version == before[0]
    assert out._version > before[1]


def test_arenas(served):
    shared = hdispatch.Arena()
    small, large = block("small", arena=shared, max_rows=2), block("large", arena=shared, max_rows=64)
    assert shared.nbytes == 0
    check(small, 2)
    assert small.arena_bytes <= shared.nbytes < 2 * small.arena_bytes + 1024
    check(large, 2)
    grown = shared.nbytes
    assert grown >= large.arena_bytes
    check(small, 2)
    check(large, 60)
    assert shared.nbytes == grown


def test_an_arena_of_given_memory(served):
    """All streams, and threads, have it; too little of it, or what is no whole allocation, is an error."""
    small = block("in given memory", max_rows=4)
    wanted = small.arena_bytes + 256
    memory = torch.full((wanted,), 255, dtype=torch.uint8)
    arena = hdispatch.Arena(memory)
    assert arena.nbytes == wanted
    check(block("in given memory", arena=arena, max_rows=4), 4)
    assert not memory.eq(255).all()
    short = block("in too little", arena=hdispatch.Arena(memory[:-1]), max_rows=4)
    with pytest.raises(ArgumentError, match=f"memory has {wanted - 1} bytes; the sequence takes {wanted}, arena_by"):
        check(short, 1)
    for wrong, reason in (
        (memory[1:], "from element 1 of its storage on; it takes all of a contiguous uint8 tensor"),
        (memory.view(torch.int8), "is CPUCharType of 1 dimensions"),
        (memory.view(-1, 1), "of 2 dimensions"),
        (64, "is a int; it takes a torch.Tensor or None"),
    ):
        with pytest.raises(ArgumentError, match=reason):
            hdispatch.Arena(wrong)


def test_many_layouts_are_forgotten(served):
    sequence = block("many")
    for m in range(1, 90):
        check(sequence, m)
    for m in range(1, 90):
        check(sequence, m)
