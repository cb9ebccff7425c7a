"""Triton kernels compiled side by side, with a compiler that only notes what it gets."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")
from hdispatch.integrations.vllm.compiling import compile_side_by_side  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

CPU = torch.device("cpu")


@triton.jit
def first(x, n):
    pass


@triton.jit
def second(x, n):
    pass


class Compiled:
    """What Triton makes of a kernel."""

    def __init__(self) -> None:
        self.loaded = False

    def _init_handles(self) -> None:
        self.loaded = True


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What Triton was asked for: kernel, arguments, options, whether in this thread, and what it gave."""
    asked: list[tuple[Any, ...]] = []
    here = threading.get_ident()

    def run(kernel: Any, *given: Any, grid: Any, warmup: bool, **named: Any) -> Any:
        asked.append((kernel.fn.__name__, given, grid, warmup, named, threading.get_ident() == here, Compiled()))
        if named.get("broken"):
            raise RuntimeError("cannot be compiled")
        return asked[-1][-1]

    monkeypatch.setattr(JITFunction, "run", run)
    return asked


def test_a_call_compiles_and_launches_nothing(made: list[tuple[Any, ...]]) -> None:
    x, real = torch.zeros(3), JITFunction.run

    def call() -> None:
        assert first[(2,)](x, 3, num_warps=1) is None
        second[(1,)](x, n=4)
        first.warmup(x, 3, grid=(7,))

    compile_side_by_side(call, JITFunction, CPU)
    assert JITFunction.run is real
    found = {(name, grid): (given, warmup, named, here) for name, given, grid, warmup, named, here, _ in made}
    assert found.keys() == {("first", (2,)), ("second", (1,)), ("first", (7,))}
    assert found["first", (2,)] == ((x, 3), True, {"num_warps": 1}, False)
    assert found["second", (1,)] == ((x,), True, {"n": 4}, False)
    assert found["first", (7,)][3]  # a caller that compiles gets what it compiled
    assert [each[-1].loaded for each in made if not each[5]] == [True, True]
    first[(2,)](x, 3)
    assert made[-1][3:6] == (False, {}, True)


def test_what_is_broken_is_told_where_it_is_launched(made: list[tuple[Any, ...]]) -> None:
    def call() -> None:
        first[(1,)](torch.zeros(3), 3, broken=True)

    compile_side_by_side(call, JITFunction, CPU)
    assert len(made) == 1
    with pytest.raises(RuntimeError, match="cannot be compiled"):
        call()


def test_the_call_fails_as_it_would(made: list[tuple[Any, ...]]) -> None:
    real = JITFunction.run

    def call() -> None:
        first[(1,)](torch.zeros(3), 3)
        raise ValueError("of the call")

    with pytest.raises(ValueError, match="of the call"):
        compile_side_by_side(call, JITFunction, CPU)
    assert JITFunction.run is real
    assert made[0][-1].loaded
