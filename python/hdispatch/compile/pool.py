"""Worker processes that compile, for a build, for tuning and for the kernels' lists: started as they are needed, then gone."""

from __future__ import annotations

import contextlib
import os
import queue
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar, cast

from ..child import Child, WorkerGone, WorkerLate
from ..errors import BuildError
from .build_unit import Built, Unit
from .target import GpuTarget
from .versions import ptxas, ptxas_variable
from .worker import Settings

#: Settings of the caller that would change the code that is generated, or where it is cached.
_FOREIGN = (
    "TRITON_",
    "HELION_",
    "TORCHINDUCTOR_",
    "TORCH_COMPILE_",
    "MLIR_",
    "LLVM_",
    "NVPTX_",
    "DISABLE_LLVM_",
    "DISABLE_PTXAS_",
    "PTXAS_",
    "USE_IR_LOC",
    "CUTE_DSL_",
)

#: -P keeps the current folder off the module path: one with a helion.py in it would shadow Helion.
_COMMAND = (sys.executable, "-P", "-c", "from hdispatch.compile.worker import main; main()")

Result = TypeVar("Result")


class WorkerLost(BuildError):
    """A worker process is gone: killed for its memory, for taking too long, or with the whole run."""


def available_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0))


def checked_jobs(jobs: int | None) -> int:
    """How many worker processes: one per CPU for None. BuildError for less than one."""
    if jobs is not None and jobs < 1:
        raise BuildError(f"jobs is {jobs}; it takes at least 1 worker process")
    return jobs or available_cpus()


def environment(scratch: Path, target: GpuTarget) -> dict[str, str]:
    """The caller's environment without what changes the code, and with what makes it reproducible."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_FOREIGN)}
    return kept | {
        "CUDA_VISIBLE_DEVICES": "",
        "CUTE_DSL_ARCH": target.arch,
        "HELION_CACHE_DIR": str(scratch / "helion"),
        "OMP_NUM_THREADS": "1",
        "PYTHONHASHSEED": "0",
        "TMPDIR": str(scratch),  # a process that is killed removes nothing
        "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor"),
        "TRITON_CACHE_DIR": str(scratch / "triton"),
        "TRITON_DEFAULT_FP_FUSION": "1",
        "TRITON_DISABLE_LINE_INFO": "1",
        ptxas_variable(target): str(ptxas(target)),
    }


class Pool:
    """Worker processes for one target and build cache, used in a `with` block: at its end every process is gone.

    Any thread may ask; each request has a process to itself. A process that ends or takes too long is replaced.
    """

    def __init__(self, target: GpuTarget, store: Path) -> None:
        self._settings = Settings(target.to_json(), str(store), [path for path in sys.path if path])
        self._scratch = tempfile.TemporaryDirectory(prefix="hdispatch-build-", ignore_cleanup_errors=True)
        self._target = target
        self._idle: queue.SimpleQueue[Child] = queue.SimpleQueue()
        self._all: list[Child] = []
        self._lock = threading.Lock()
        self._ended = False

    def __enter__(self) -> Pool:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """End every process and remove what they cached for themselves."""
        self.kill()
        for worker in self._all:
            worker.close()
        self._scratch.cleanup()

    def build(self, unit: Unit, tools: Mapping[str, str], seconds: float | None = None) -> list[Built]:
        """The records of a unit. BuildError if it has none; WorkerLost if its process ended or took more than `seconds`."""
        answer = self.ask(unit.label, {"unit": unit.to_json(), "tools": dict(tools)}, seconds)
        return cast("list[Built]", answer["built"])

    def ask(self, what: str, request: Mapping[str, Any], seconds: float | None = None) -> dict[str, Any]:
        """The answer to a request of worker.py. BuildError, which begins with `what`, as `build` raises it."""
        worker = self._take(what)
        try:
            worker.send(request)
            answer = worker.receive(seconds)
        except (WorkerGone, WorkerLate) as error:
            worker.kill()
            raise WorkerLost(f"{what}: {error}") from error
        self._idle.put(worker)
        if "error" in answer:
            refused = BuildError(f"{what}: {answer['error']}")
            if answer["detail"]:
                refused.add_note(answer["detail"])
            raise refused
        return answer

    def _take(self, what: str) -> Child:
        with self._lock:
            if self._ended:
                raise WorkerLost(f"{what}: the run was broken off")
            with contextlib.suppress(queue.Empty):
                return self._idle.get_nowait()
            worker = Child(_COMMAND, environment(Path(self._scratch.name), self._target))
            self._all.append(worker)
        with contextlib.suppress(WorkerGone):  # it ended at once: the request that follows says so
            worker.send(asdict(self._settings))
        return worker

    def kill(self) -> None:
        """End every process: what they work on is lost, and no other begins."""
        with self._lock:
            self._ended = True
            for worker in self._all:
                worker.kill()

    def map(self, function: Callable[[int], Result], count: int, jobs: int) -> Iterator[tuple[int, Result]]:
        """`function` of 0 … count - 1 in `jobs` threads, which may ask this pool: index and result as they finish.

        Raises the first error. At its end, whole or early, the pool's processes are gone: they end with the thread that
        started them (see `child.begin`).
        """
        threads = ThreadPoolExecutor(max(1, min(jobs, count)))
        try:
            futures = {threads.submit(function, index): index for index in range(count)}
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            threads.shutdown(wait=False, cancel_futures=True)
            self.kill()
            threads.shutdown(wait=True)
