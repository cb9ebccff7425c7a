"""Worker processes: started, fed with units, and gone when the build is."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from ..errors import BuildError
from .build_unit import Built, Unit
from .target import GpuTarget
from .versions import ptxas, ptxas_variable
from .worker import Setup

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
    "CUTE_DSL_",
)

#: -P keeps the current folder off the module path: one with a helion.py in it would shadow Helion.
_COMMAND = (sys.executable, "-P", "-c", "from hdispatch.compile.worker import main; main()")


def available_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0))


def run(
    units: Sequence[tuple[Unit, Mapping[str, str]]], target: GpuTarget, store: Path, jobs: int
) -> Iterator[tuple[int, list[Built]]]:
    """Builds units, each with its tools' versions, in `jobs` processes; yields their indices and records as they finish.

    BuildError with the unit's name for the first one that fails; the processes are gone when the iteration ends.
    """
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for index in range(len(units)):
        waiting.put(index)
    finished: queue.SimpleQueue[tuple[int, list[Built]] | BaseException] = queue.SimpleQueue()
    with tempfile.TemporaryDirectory(prefix="hdispatch-build-") as scratch:
        setup = Setup(target.to_json(), str(store), [path for path in sys.path if path])
        workers = [_Worker(setup, environment(Path(scratch), target)) for _ in range(min(jobs, len(units)))]
        threads = [threading.Thread(target=_serve, args=(worker, units, waiting, finished)) for worker in workers]
        try:
            for thread in threads:
                thread.start()
            for _ in units:
                result = finished.get()
                if isinstance(result, BaseException):
                    raise result
                yield result
        finally:
            for worker in workers:
                worker.kill()
            for thread in threads:
                thread.join()
            for worker in workers:
                worker.close()


def _serve(
    worker: _Worker,
    units: Sequence[tuple[Unit, Mapping[str, str]]],
    waiting: queue.SimpleQueue[int],
    finished: queue.SimpleQueue[tuple[int, list[Built]] | BaseException],
) -> None:
    while True:
        try:
            index = waiting.get_nowait()
        except queue.Empty:
            return
        try:
            finished.put((index, worker.build(*units[index])))
        except BaseException as error:
            finished.put(error)
            return


def environment(scratch: Path, target: GpuTarget) -> dict[str, str]:
    """The caller's environment without what changes the code, and with what makes it reproducible."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_FOREIGN)}
    return kept | {
        "CUDA_VISIBLE_DEVICES": "",
        "CUTE_DSL_ARCH": target.arch,
        "HELION_CACHE_DIR": str(scratch / "helion"),
        "OMP_NUM_THREADS": "1",
        "PYTHONHASHSEED": "0",
        "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor"),
        "TRITON_CACHE_DIR": str(scratch / "triton"),
        "TRITON_DEFAULT_FP_FUSION": "1",
        "TRITON_DISABLE_LINE_INFO": "1",
        ptxas_variable(target): str(ptxas(target)),
    }


class _Worker:
    """One worker process and its pipes."""

    def __init__(self, setup: Setup, environment: Mapping[str, str]) -> None:
        self.log = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(
            _COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, env=dict(environment)
        )
        self.setup = setup.to_line()

    def build(self, unit: Unit, tools: Mapping[str, str]) -> list[Built]:
        """The records of a unit. BuildError if it has none, or if the process dies."""
        line = self.setup + json.dumps({"unit": unit.to_json(), "tools": dict(tools)}) + "\n"
        self.setup = ""
        answer = self._ask(line)
        if answer is None:
            raise BuildError(
                f"{unit.label}: the worker process ended with status {self.process.wait()}; it said:\n{self._said()}"
            )
        reply: dict[str, Any] = json.loads(answer)
        if "error" in reply:
            error = BuildError(f"{unit.label}: {reply['error']}")
            if reply["detail"]:
                error.add_note(reply["detail"])
            raise error
        built: list[Built] = reply["built"]
        return built

    def _ask(self, line: str) -> str | None:
        """The answer to a line; None if the process is gone."""
        try:
            _pipe(self.process.stdin).write(line)
            _pipe(self.process.stdin).flush()
        except BrokenPipeError:
            return None
        return _pipe(self.process.stdout).readline() or None

    def _said(self) -> str:
        self.log.seek(0)
        return self.log.read().decode(errors="replace")[-4000:]

    def kill(self) -> None:
        """Ends the process; a unit that it works on is lost."""
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        """Closes the pipes of a process that is gone, once no thread uses them."""
        with contextlib.suppress(BrokenPipeError):  # what was not sent has no receiver
            _pipe(self.process.stdin).close()
        _pipe(self.process.stdout).close()
        self.log.close()


def _pipe(pipe: IO[str] | None) -> IO[str]:
    if pipe is None:
        raise BuildError("the worker process was started without a pipe")
    return pipe
