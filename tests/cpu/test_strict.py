"""Strict mode: a block is its context's, whatever other threads, tasks and overlapping blocks do; the process's is a call."""

from __future__ import annotations

import asyncio
import threading

import hdispatch
import pytest
import torch
import toy

pytestmark = pytest.mark.usefixtures("bundle")

DOORS = {"hdispatch.ops": hdispatch.ops.toy, "torch.ops default": torch.ops.hdispatch.toy.default}


def raises(door=hdispatch.ops.toy) -> bool:
    """Whether a miss raises here and now."""
    try:
        door(*toy.arguments(4, 513))
    except hdispatch.MissError:
        return True
    return False


@pytest.mark.parametrize("door", DOORS)
def test_blocks_nest(door):
    call = DOORS[door]
    assert not raises(call)
    with hdispatch.strict():
        assert raises(call)
        with hdispatch.strict(False):
            assert not raises(call)
            with hdispatch.strict():
                assert raises(call)
        assert raises(call)
    assert not raises(call)


def test_the_process_is_strict_where_no_block_says_otherwise():
    hdispatch.set_strict()
    assert raises()
    with hdispatch.strict(False):
        assert not raises()
    assert raises()
    hdispatch.set_strict(False)
    assert not raises()


def test_a_block_that_is_not_entered_changes_nothing():
    hdispatch.strict()
    assert not raises()


def test_blocks_that_overlap():
    first, second = hdispatch.strict(), hdispatch.strict()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert raises()
    second.__exit__(None, None, None)
    assert not raises()


def test_one_object_in_two_blocks():
    mode = hdispatch.strict()
    with mode:
        with mode:
            assert raises()
        assert raises()
    assert not raises()


def test_a_block_of_one_thread_is_not_another_threads():
    inside, done = threading.Event(), threading.Event()
    seen = []

    def work() -> None:
        with hdispatch.strict():
            seen.append(raises())
            inside.set()
            done.wait()
            seen.append(raises())

    thread = threading.Thread(target=work)
    thread.start()
    inside.wait()
    assert not any(raises() for _ in range(100))
    done.set()
    thread.join()
    assert seen == [True, True]


def test_overlapping_blocks_of_many_threads_leave_nothing_on():
    wrong = []

    def work(number: int) -> None:
        for _ in range(200):
            with hdispatch.strict(number % 2 == 0):
                if raises() != (number % 2 == 0):
                    wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert not raises()


def test_a_block_is_its_tasks():
    async def strict_task(other: asyncio.Event, mine: asyncio.Event) -> bool:
        with hdispatch.strict():
            mine.set()
            await other.wait()
            return raises()

    async def plain_task(other: asyncio.Event, mine: asyncio.Event) -> bool:
        await other.wait()
        found = raises()
        mine.set()
        return found

    async def both() -> list[bool]:
        entered, looked = asyncio.Event(), asyncio.Event()
        return list(await asyncio.gather(strict_task(looked, entered), plain_task(entered, looked)))

    assert asyncio.run(both()) == [True, False]


def test_a_block_left_in_another_context():
    def generator():
        with hdispatch.strict():
            yield

    import contextvars

    suspended = generator()
    contextvars.copy_context().run(next, suspended)
    suspended.close()
    assert not raises()


def test_a_block_that_is_left_twice():
    mode = hdispatch.strict()
    with mode:
        pass
    with pytest.raises(hdispatch.HdispatchError, match="not open"):
        mode.__exit__(None, None, None)
    with hdispatch.strict("yes"):  # type: ignore[arg-type]
        assert raises()
