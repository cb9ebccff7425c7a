"""A forked child finds no lock taken and no table half-made, whatever the parent's threads were doing."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import hdispatch
import pytest
import toy
from hdispatch import Key
from hdispatch.testing import null

FORKS = 100
#: A child that takes this long hangs: its work is a few milliseconds.
DEADLINE = 20.0

pytestmark = [
    pytest.mark.usefixtures("bundle"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),  # Python 3.12: forking with threads is the test
]


@pytest.fixture(scope="module")
def function() -> Any:
    cpp = pytest.importorskip("tvm_ffi.cpp", reason="needs apache-tvm-ffi: pip install 'hdispatch[ffi]'")
    return cpp.load_inline("hdispatch_test_fork", cpp_sources="void nothing() {}", functions=["nothing"]).nothing


def register(function: Any) -> hdispatch.Registration:
    return hdispatch.register("toy", Key("bfloat16", K=77), function, args=[], stream="none", driver="null")


@contextmanager
def busy(work: Callable[[], None], threads: int = 2) -> Iterator[None]:
    stop = threading.Event()

    def loop() -> None:
        while not stop.is_set():
            work()

    started = [threading.Thread(target=loop) for _ in range(threads)]
    for thread in started:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in started:
            thread.join()


def forked(child: Callable[[], None]) -> str:
    """Run `child` in a fork: "" if it ends well, else what went wrong."""
    pid = os.fork()
    if pid == 0:
        try:
            child()
            os._exit(0)
        except BaseException:
            os._exit(1)
    for _ in range(int(DEADLINE / 0.005)):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return "" if status == 0 else f"status {status}"
        time.sleep(0.005)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    return "hangs"


def use_everything(function: Any) -> Callable[[], None]:
    """A hit, a miss, statistics, a registration, launches on record, an unload."""

    def child() -> None:
        hdispatch.ops.toy(*toy.arguments(4, 64))
        hdispatch.ops.toy(*toy.arguments(4, 513))
        registration = register(function)
        with null.recording():
            hdispatch.ops.toy(*toy.arguments(4, 64))
        assert len(null.launches()) == 1
        registration.unregister()
        assert hdispatch.stats()["toy"]["misses"]["no row"] >= 1
        for each in hdispatch.loaded():
            each.unload()

    return child


def test_forks_while_threads_register(function):
    with busy(lambda: register(function).unregister()):
        found = [forked(use_everything(function)) for _ in range(FORKS)]
    assert not any(found), found


def test_forks_while_threads_miss(function):
    def miss() -> None:
        hdispatch.ops.toy(*toy.arguments(4, 513))
        hdispatch.stats()

    with busy(miss):
        found = [forked(use_everything(function)) for _ in range(FORKS)]
    assert not any(found), found


def test_forks_while_threads_are_recorded(function):
    def record() -> None:
        with null.recording():
            hdispatch.ops.toy(*toy.arguments(4, 64))

    with busy(record):
        found = [forked(use_everything(function)) for _ in range(FORKS // 4)]
    assert not any(found), found


def test_a_finalizer_unregisters_while_its_thread_registers(function):
    """The collector may run a finalizer in the middle of any allocation, one that `register` makes included."""

    class Owner:
        def __init__(self) -> None:
            self.me = self  # only the collector frees it
            self.registration = register(function)

        def __del__(self) -> None:
            self.registration.unregister()

    done = threading.Event()

    def work() -> None:
        threshold = gc.get_threshold()
        gc.set_threshold(1)
        try:
            for _ in range(30):
                Owner()
                register(function).unregister()
        finally:
            gc.set_threshold(*threshold)
            gc.collect()
        done.set()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    assert done.wait(60), "it hangs"
    assert hdispatch.registered() == []
    assert hdispatch.ops.toy.pick(4, 77) is None
    assert hdispatch.ops.toy.pick(4, 64) is not None


def test_a_finalizer_registers_what_cannot_be_a_row(function):
    """The bad call is refused on its own; the one in whose middle it came, and later ones, are not."""
    refused = []

    class Owner:
        def __init__(self) -> None:
            self.me = self

        def __del__(self) -> None:
            try:
                hdispatch.register("toy", Key("bfloat16", K=2**40), function, args=[], stream="none", driver="null")
            except hdispatch.BundleError as error:
                refused.append(error)

    threshold = gc.get_threshold()
    gc.set_threshold(1)
    try:
        for _ in range(20):
            Owner()
            register(function).unregister()
    finally:
        gc.set_threshold(*threshold)
        gc.collect()
    assert len(refused) == 20
    assert hdispatch.registered() == []
    register(function).unregister()


def test_an_interrupt_in_the_middle_of_a_change(function):
    """KeyboardInterrupt at any line of a change: list and table agree after the next one."""
    import sys

    from hdispatch import runtime

    code = {runtime._Serving._change.__code__, runtime._Serving._update.__code__}
    for line in range(60):
        registration = register(function)
        left = [line]

        def trace(frame, event, _arg, left=left):
            if frame.f_code in code and event == "line":
                left[0] -= 1
                if left[0] == 0:
                    raise KeyboardInterrupt
            return trace

        sys.settrace(trace)
        try:
            registration.unregister()
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(None)
        registration.unregister()
        assert hdispatch.registered() == []
        assert hdispatch.ops.toy.pick(4, 77) is None
