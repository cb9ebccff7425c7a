"""No door keeps other Python threads waiting while a launch blocks: the GIL is released."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hdispatch
import pytest
import torch
import toy
from hdispatch import Key
from standin import DOORS as OVERRIDDEN
from standin import TOY, Library

SECONDS = 0.5
TICK = 0.005
SOURCE = f"#include <unistd.h>\nvoid nap() {{ usleep({int(SECONDS * 1e6)}); }}"

OURS: dict[str, Callable[..., None]] = {
    "hdispatch.ops": hdispatch.ops.toy,
    "torch.ops": torch.ops.hdispatch.toy,
    "torch.ops default": torch.ops.hdispatch.toy.default,
}


@pytest.fixture(scope="module")
def nap() -> Any:
    """A TVM-FFI function that blocks, as cuLaunchKernelEx does when the launch queue is full."""
    cpp = pytest.importorskip("tvm_ffi.cpp", reason="needs apache-tvm-ffi: pip install 'hdispatch[ffi]'")
    return cpp.load_inline("hdispatch_test_gil", cpp_sources=SOURCE, functions=["nap"]).nap


@pytest.fixture(autouse=True)
def registered(nap: Any) -> Iterator[None]:
    registration = hdispatch.register("toy", Key("bfloat16"), nap, args=[], stream="none", driver="null")
    yield
    registration.unregister()


def ticks_during(call: Callable[[], None]) -> int:
    """How often another Python thread gets its turn, every TICK seconds, while a call blocks."""
    counted, started, stop = 0, threading.Event(), threading.Event()

    def count() -> None:
        nonlocal counted
        started.set()
        while not stop.is_set():
            time.sleep(TICK)
            counted += 1

    thread = threading.Thread(target=count)
    thread.start()
    started.wait()
    counted = 0
    begin = time.perf_counter()
    call()
    taken = time.perf_counter() - begin
    during = counted
    stop.set()
    thread.join()
    assert taken >= SECONDS, "the call did not block: the function was not called"
    return during


@pytest.mark.parametrize("door", OURS)
def test_another_thread_runs_while_a_launch_blocks(door):
    args = toy.arguments()
    assert ticks_during(lambda: OURS[door](*args)) >= SECONDS / TICK / 4


@pytest.mark.parametrize("door", OVERRIDDEN)
def test_another_thread_runs_while_an_overridden_op_blocks(door):
    library = Library(TOY)
    call, args = OVERRIDDEN[door](library.ops.toy), toy.arguments()
    with library.override():
        assert ticks_during(lambda: call(*args)) >= SECONDS / TICK / 4
    assert library.calls == []


def test_two_threads_launch_at_once():
    """Two launches that block take the time of one."""
    threads = [threading.Thread(target=hdispatch.ops.toy, args=toy.arguments()) for _ in range(2)]
    begin = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert time.perf_counter() - begin < 1.6 * SECONDS


#: A daemon thread is in a launch that blocks while the interpreter ends: it asks for the GIL back and is unwound from there.
ENDS = """
import sys, threading, time, torch, hdispatch
import {module} as module
from tvm_ffi import cpp
if (spec := getattr(module, "SPEC", None)) and spec.name not in hdispatch.registry.names():
    hdispatch.registry.define(spec)
nap = cpp.load_inline("hdispatch_test_gil", cpp_sources={source!r}, functions=["nap"]).nap
hdispatch.register({name!r}, hdispatch.Key({variant!r}), nap, args=[], stream="none", driver="null")
op, args = hdispatch.ops.{name}, {args}
threading.Thread(target=lambda: [op(*args) for _ in range(100)], daemon=True).start()
class Slow:
    def __del__(self, sleep=time.sleep):
        sleep(2 * {seconds})  # the thread asks meanwhile
slow = Slow()
time.sleep({seconds} / 2)
assert hdispatch.stats()[{name!r}]["hits"] == 0
print("ends", flush=True)
"""


@pytest.mark.parametrize(
    ("name", "module", "variant", "args"),
    [
        ("toy", "toy", "bfloat16", "module.arguments()"),
        ("returned_square", "returned_square.spec", "any", "[torch.zeros(4, 256, dtype=torch.float16)]"),
    ],
)
def test_the_interpreter_ends_while_a_launch_blocks(nap, name, module, variant, args):
    program = ENDS.format(name=name, module=module, variant=variant, args=args, source=SOURCE, seconds=SECONDS)
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(Path(toy.__file__).parent)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "ends\n"), done.stderr
