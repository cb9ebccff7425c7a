"""Calls of many threads, and a table that is replaced meanwhile."""

from __future__ import annotations

import threading

import hdispatch
import pytest
import toy
from doors import (
    DOORS,
    counted,
    counts,
)

pytestmark = pytest.mark.usefixtures("bundle")


def test_threads_add_up():
    calls, threads = 300, 4
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            doors = list(DOORS.values())
            hit, miss, empty = toy.arguments(4), toy.arguments(4, 513), toy.arguments(0)
            for i in range(calls):
                doors[(i + number) % 3](*hit)
                if i % 10 == 0:
                    doors[i // 10 % 3](*miss)
                    doors[i // 10 % 3](*empty)
                    with pytest.raises(hdispatch.ArgumentError):
                        doors[i // 10 % 3](*hit[:1], None, *hit[2:])
        except BaseException as error:
            errors.append(error)

    workers = [threading.Thread(target=work, args=(n,)) for n in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not errors
    assert counts() == counted(hits=calls * threads, empty=calls * threads // 10, **{"no row": calls * threads // 10})


def test_threads_and_a_table_that_is_replaced(folder):
    stop = threading.Event()
    errors: list[BaseException] = []

    def work() -> None:
        args = toy.arguments(4)
        while not stop.is_set():
            try:
                for each in DOORS.values():
                    each(*args)
            except BaseException as error:
                errors.append(error)
                return

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for _ in range(30):
        hdispatch.load(folder, driver="null")
    stop.set()
    for worker in workers:
        worker.join()
    assert not errors
    assert counts()["hits"] > 0
    assert counts()["misses"] == {}
