"""torch.compile as a peer: functions derived from the ops' references, and compiled by many processes ahead of the timing.

What the processes compile goes to Inductor's cache on disk, from which the process that measures takes it.
"""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from hdispatch import registry
from hdispatch.errors import first_line
from hdispatch.opspec import OpSpec, TensorArg

from . import peers
from .grid import OPS as REPORTED
from .grid import PRODUCTS, Cell
from .timing import Binder, make_arguments, require_gpu

Function = Callable[..., Any]

#: Options of torch.compile: Inductor's defaults without its checks of every call, and with combo kernels.
OPTIONS: dict[str, bool] = {
    "enable_auto_functionalized_v2": False,
    "size_asserts": False,
    "alignment_asserts": False,
    "scalar_asserts": False,
    "combo_kernels": True,
    "benchmark_combo_kernel": True,
}
#: Ops that torch.compile is measured on. GEMMs have libraries as peers.
OPS = tuple(op for op in REPORTED if op not in PRODUCTS)


def functional(spec: OpSpec) -> Function:
    """The op's reference as a function of the op's arguments that writes none of them: it returns what the op writes."""
    written = [at for at, arg in enumerate(spec.args) if isinstance(arg, TensorArg) and arg.mutated]
    reference = spec.reference

    def function(*arguments: Any) -> tuple[Any, ...]:
        given = list(arguments)
        for at in written:
            (given[at],) = peers.copied([given[at]])  # no copy is left of what is overwritten whole
        reference(*given)
        return tuple(given[at] for at in written if given[at] is not None)

    return function


def compile_op(op: str) -> Function:
    """The op's function under torch.compile; the first call compiles it, for the shapes of that call."""
    torch._dynamo.reset()  # it finds compiled functions by code object, and all of these have the same
    return compile_function(functional(registry.spec(op)))


def compile_function(function: Function) -> Function:
    """A function under torch.compile as the benchmark has it."""
    compiled: Function = torch.compile(function, fullgraph=True, dynamic=False, options=dict(OPTIONS))
    return compiled


def binder(function: Function) -> Binder:
    """Binds calls of a compiled function; the first arguments that are bound compile it."""

    def bind(_op: str, arguments: Sequence[Any]) -> peers.Bound:
        for _ in range(2):  # the second call finds everything compiled and tuned
            function(*arguments)
        return function, tuple(arguments)

    return bind


# ---- ahead of the timing ----


@dataclass
class Compiled:
    """Result of compiling: the finished cells with the seconds of each, the failed ones with their reasons."""

    cells: list[Cell] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    failed: list[tuple[Cell, str]] = field(default_factory=list)


@contextmanager
def caches() -> Iterator[Path]:
    """A folder that is gone at the end; within, the caches of Inductor and Triton are there, for new processes too."""
    with tempfile.TemporaryDirectory(prefix="hdispatch-ops-", ignore_cleanup_errors=True) as folder:
        own = {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor", "TRITON_CACHE_DIR": f"{folder}/triton"}
        with _environment(own):
            yield Path(folder)


@contextmanager
def _environment(own: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in own}
    os.environ.update(own)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def compile_cells(
    cells: Sequence[Cell],
    processes: int,
    deadline: float,
    lock: Path | None,
    tick: Callable[[], None] = lambda: None,
    compile_cell: Callable[[Cell], float] | None = None,
) -> Compiled:
    """Compile cells in `processes` processes until `deadline` of time.monotonic; `tick` is called after each.

    lock          a file; a process measures only while it holds it, because compilers choose kernels by measuring; None:
                  nothing is measured
    compile_cell  what a process does with a cell, and its seconds; a function of a module
    """
    done: dict[int, float] = {}
    failed: dict[int, str] = {}
    before = multiprocessing.active_children()
    with _environment({"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}):
        spawn = multiprocessing.get_context("spawn")
        turns: dict[str, Any] = {"initializer": _take_turns, "initargs": (lock,)} if lock else {}
        pool = ProcessPoolExecutor(processes, mp_context=spawn, **turns)
        waiting = {pool.submit(compile_cell or _compile_cell, cell): at for at, cell in enumerate(cells)}
        try:
            for future in as_completed(waiting, timeout=max(0.0, deadline - time.monotonic())):
                if error := future.exception():  # a compiler may raise anything, or end its process
                    failed[waiting[future]] = first_line(error)
                else:
                    done[waiting[future]] = future.result()
                tick()
        except TimeoutError:  # the others are not compiled
            pass
        finally:
            for future in waiting:
                future.cancel()
            for process in multiprocessing.active_children():
                if process not in before:
                    process.kill()
            pool.shutdown()  # returns when they are gone
    return Compiled(
        [cells[at] for at in sorted(done)],
        [done[at] for at in sorted(done)],
        [(cells[at], failed[at]) for at in sorted(failed)],
    )


def _compile_cell(cell: Cell) -> float:
    start = time.perf_counter()
    device = require_gpu()
    arguments, function = make_arguments(cell, device), compile_op(cell["op"])
    for _ in range(2):  # the second call finds everything compiled and tuned
        function(*arguments)
    torch.cuda.synchronize(device)
    del arguments
    torch.cuda.empty_cache()
    return time.perf_counter() - start


def _take_turns(lock: Path) -> None:
    """Let Inductor's own measurements hold the lock."""
    from torch._inductor.runtime import benchmarking

    benchmarker: Any = benchmarking.benchmarker
    measure = benchmarker.benchmark_gpu

    def alone(*args: Any, **kwargs: Any) -> Any:
        with lock.open("a") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            return measure(*args, **kwargs)

    benchmarker.benchmark_gpu = alone
