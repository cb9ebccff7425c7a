"""A process of the op benchmark: torch.compile compiles a share of the cells in it, and then it times them when told to.

Speaks JSON, an object per line, each answered by one: first what `Setup` holds, then `{"do": "compile", "cell": …}`,
`{"do": "time", "cell": …}` or `{"do": "stats"}`. An answer `{"error": text}` says that it could not. Answers go to the
standard output that the process was started with; whatever compilers print goes to standard error.
"""

from __future__ import annotations

import fcntl
import functools
import json
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .. import child, runtime
from . import compiled, peers
from .ops_grid import Cell
from .ops_timing import Binder, make_arguments, measure, require_gpu
from .paths import first_line


@dataclass(frozen=True)
class Setup:
    """What every cell of a run shares. `lock` is a file: compilers measure their own candidates one process at a time."""

    bundle: str
    vllm_ops: str | None
    rounds: int
    seed: int
    lock: str


@dataclass
class Worker:
    """The state between requests."""

    setup: Setup
    device: torch.device
    order: random.Random
    compiled: dict[str, compiled.Function] = field(default_factory=dict)

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a request; never raises."""
        try:
            if request["do"] == "compile":
                return self._compile(request["cell"])
            if request["do"] == "time":
                return self._time(request["cell"])
            return {"stats": runtime.stats()}
        except Exception as error:  # a compiler may raise anything; who asked goes on with the next cell
            return {"error": first_line(error)}

    def _compile(self, cell: Cell) -> dict[str, Any]:
        arguments = make_arguments(cell, self.device)
        start = time.perf_counter()
        function = compiled.compile_op(cell["op"])
        for _ in range(2):  # the second call finds everything compiled and tuned
            function(*arguments)
        torch.cuda.synchronize(self.device)
        self.compiled[cell_name(cell)] = function
        del arguments
        torch.cuda.empty_cache()
        return {"seconds": round(time.perf_counter() - start, 3)}

    def _time(self, cell: Cell) -> dict[str, Any]:
        function = self.compiled.pop(cell_name(cell))

        def bind(_op: str, arguments: Sequence[Any]) -> peers.Bound:
            return function, tuple(arguments)

        binders: dict[str, Binder] = {peers.OURS: peers.bind_ours, peers.COMPILE: bind}
        if self.setup.vllm_ops:
            binders[peers.VLLM] = peers.bind_vllm
        with runtime.strict():
            result = measure(cell, binders, self.device, self.setup.rounds, self.order)
        torch.cuda.empty_cache()
        return {"timings": result.timings, "failures": result.failures}


def cell_name(cell: Cell) -> str:
    """A name that no two cells share."""
    return "/".join(str(value) for value in cell.values())


def main() -> None:
    """Serve requests from standard input until it ends."""
    answers = child.begin()
    worker: Worker | None = None
    for line in sys.stdin:
        try:
            if worker is None:
                worker = _start(Setup(**json.loads(line)))
                answer: dict[str, Any] = {}
            else:
                answer = worker.answer(json.loads(line))
        except Exception as error:  # the parent says what this process could not do
            answer = {"error": first_line(error)}
        child.answer(answers, answer)


def _start(setup: Setup) -> Worker:
    device = require_gpu()
    runtime.load(setup.bundle, device=device)
    if setup.vllm_ops:
        peers.load_vllm_ops(Path(setup.vllm_ops))
    _take_turns(Path(setup.lock))
    return Worker(setup, device, random.Random(setup.seed))


def _take_turns(file: Path) -> None:
    """Let Inductor's own measurements hold a lock that all processes share: they choose kernels by what they measure."""
    from torch._inductor.runtime import benchmarking

    benchmarker: Any = benchmarking.benchmarker
    benchmarker.benchmark_gpu = _locked(benchmarker.benchmark_gpu, file)


def _locked(measurement: Callable[..., Any], file: Path) -> Callable[..., Any]:
    @functools.wraps(measurement)
    def alone(*args: Any, **kwargs: Any) -> Any:
        with _holding(file):
            return measurement(*args, **kwargs)

    return alone


@contextmanager
def _holding(file: Path) -> Iterator[None]:
    with file.open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
