"""Python processes that are forked of one that has imported torch, Triton, Helion and CuteDSL: 5 to 12 s of CPU a process.

`python("-c", code)` and `worker(code)` are commands to start in place of `python -c code`: a small client (forked_client.py)
hands its arguments, pipes, environment and folder to a server, which forks, and ends as the forked process ends; that is
killed when the client is gone. A server answers for one kind of process: one that compiles for an architecture believes in a
GPU of it as Helion is imported, others in none. Whoever asks with an environment that changes how Python starts or how these
libraries are imported gets a process of its own, as does who asks while nothing serves.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
import types
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

HERE = Path(__file__).parent
CLIENT = (sys.executable, "-I", "-S", str(HERE / "forked_client.py"))
#: Kinds of servers, and the GPU that a process believes in as it imports; a worker installs its own over it.
KINDS = {"libraries": None, "sm_80": "a100", "sm_90a": "h200", "sm_100a": "b200"}
#: There where NVIDIA's driver is.
GPU = Path("/dev/nvidiactl")
#: Where the sockets are, for processes that tests start too.
FOLDER = "HDISPATCH_TEST_FORKED"
#: Variables that Python, the loader and the libraries read as they start and are imported, by how they begin; but for
#: those that are read when they are needed.
AT_IMPORT = (
    "PYTHON",
    "LD_",
    "MALLOC_",
    "OMP_",
    "MKL_",
    "TORCH",
    "PYTORCH_",
    "TRITON_",
    "HELION_",
    "CUDA_",
    "CUTE_",
    "MLIR_",
    "LLVM_",
)
LATER = ("HELION_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH")
_PR_SET_PDEATHSIG = 1


def python(*arguments: object) -> tuple[str, ...]:
    """A command as `sys.executable` with these arguments: -P and -W ignore; then -c code, -m module or a file, and its own."""
    return (*CLIENT, "libraries", *map(str, arguments))


def worker(code: str) -> tuple[str, ...]:
    """A command as `python -P -c code` of a process that compiles: for the architecture that CUTE_DSL_ARCH says."""
    return (*CLIENT, "worker", "-P", "-c", code)


#: What a program begins with whose own compiling processes are forked too.
COMPILING = f"import sys; sys.path.append({str(HERE)!r}); import forked; forked.compile_in_forked()\n"


def compile_in_forked() -> None:
    """Let this process start `pool`'s workers so."""
    from hdispatch.compile import pool

    pool._COMMAND = worker(*pool._COMMAND[3:])


def at_import(environment: Mapping[str, str]) -> dict[str, str]:
    """What of an environment matters before a program begins."""
    return {name: value for name, value in environment.items() if name.startswith(AT_IMPORT) and name not in LATER}


def served() -> dict[str, str | None]:
    """The kinds that have a server: where a GPU is, programs may use it, and CUDA does not survive a fork."""
    has_gpu = GPU.exists()
    return {kind: target for kind, target in KINDS.items() if target is not None or not has_gpu}


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[None]:
    """A server for each kind; they import when they are first asked."""
    started: list[subprocess.Popen[bytes]] = []
    folder.mkdir(parents=True, exist_ok=True)
    try:
        for kind, target in served().items():
            program = (
                f"import sys; sys.path.append({str(HERE)!r}); import forked; forked.serve({str(folder / kind)!r}, {kind!r})"
            )
            # A program's threads would be lost in a fork; and what compiles has a seed.
            environment = os.environ | {"OMP_NUM_THREADS": "1"} | ({} if target is None else {"PYTHONHASHSEED": "0"})
            command = [sys.executable, "-P", "-c", program]
            started.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=environment))
        for process in started:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n", f"a process to fork from ended with status {process.wait()}"
        os.environ[FOLDER] = str(folder)
        yield
    finally:
        os.environ.pop(FOLDER, None)
        for process in started:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()


# ---- in the server ----


def serve(path: str, kind: str) -> None:
    """Fork for whoever connects, and tell each how its process ended."""
    sys.path.remove(str(HERE))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listening.bind(path)
    listening.listen(64)
    os.write(1, b"ready\n")
    waiting = select.poll()
    waiting.register(listening, select.POLLIN)
    #: By a file descriptor to wait for: a client's socket, or its process.
    children: dict[int, tuple[socket.socket, int, int]] = {}
    imported = Imported(kind)
    while True:
        (descriptor, _), *_ = waiting.poll()  # one at a time: what follows may close the next one's
        if descriptor == listening.fileno():
            client, _ = listening.accept()
            message, descriptors = receive(client)
            if message is None or not imported.suits(message["environment"]):
                with contextlib.suppress(OSError):
                    client.send(b'"other"')
                client.close()
            else:
                pid = fork(message, descriptors, [listening, client, *(each for each, _, _ in children.values())])
                ended = os.pidfd_open(pid)
                for each in (client.fileno(), ended):
                    children[each] = (client, pid, ended)
                    waiting.register(each, select.POLLIN)
                with contextlib.suppress(OSError):
                    client.send(b'"forked"')
            for each in descriptors:
                os.close(each)
            continue
        client, pid, ended = children[descriptor]
        if descriptor == client.fileno():  # it sends nothing more: it is gone
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        with contextlib.suppress(OSError):
            client.send(json.dumps(os.waitstatus_to_exitcode(status)).encode())
        for each in (client.fileno(), ended):
            del children[each]
            waiting.unregister(each)
        client.close()
        os.close(ended)


def receive(client: socket.socket) -> tuple[dict[str, Any] | None, list[int]]:
    """What a client asks for, and its pipes; None if it is gone."""
    message, descriptors, _, _ = socket.recv_fds(client, 1 << 21, 3)
    return json.loads(message) if message else None, list(descriptors)


class Imported:
    """What a server has imported, and the environment that it did it with: the first one's that it forked for."""

    def __init__(self, kind: str) -> None:
        self.target = KINDS[kind]
        self.asked = 0
        self.is_alone = True
        self.own = {name: value for name, value in at_import(os.environ).items() if self.target is None or starts(name)}

    def suits(self, environment: Mapping[str, str]) -> bool:
        """Whether a process with this environment would import the same; then everything is imported.

        Never again after an import that left a thread behind, which a fork would be without.
        """
        found = at_import(environment)
        if self.asked == 0 and self.target is not None:
            if {name: value for name, value in found.items() if starts(name)} != self.own:
                return False
            self.own = found
            os.environ.clear()
            os.environ.update(environment)
        if found != self.own:
            return False
        self.asked += 1
        if self.asked < 3:
            self.more()
        return self.is_alone

    def more(self) -> None:
        """What every process imports; from the second one on what only some do, which a single one would not be repaid for."""
        if self.asked == 1:
            importlib.import_module("torch")
            if self.target is not None:
                importlib.import_module("hdispatch.compile.worker")
                targets = importlib.import_module("hdispatch.compile.target")
                targets.install(targets.DESCRIBED[self.target])
        else:
            for name in ("helion", "cutlass.cute"):
                with contextlib.suppress(ImportError):  # whoever needs it says so
                    importlib.import_module(name)
        gc.collect()
        gc.freeze()
        self.is_alone = len(list(Path("/proc/self/task").iterdir())) == 1


def starts(name: str) -> bool:
    """Whether a variable is read before the first import."""
    return name.startswith(("PYTHON", "LD_", "MALLOC_"))


def fork(message: dict[str, Any], descriptors: Sequence[int], sockets: Sequence[socket.socket]) -> int:
    """The process that runs what a client asks for."""
    pid = os.fork()
    if pid == 0:
        for each in sockets:
            each.close()
        work(message, descriptors)
    return pid


# ---- in the process that is forked ----


def work(message: dict[str, Any], descriptors: Sequence[int]) -> NoReturn:
    """Run Python's arguments with the client's pipes, environment and folder."""
    status = 1
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number, descriptor in enumerate(descriptors):
            os.dup2(descriptor, number)
            os.close(descriptor)
        sys.stdin, sys.stdout = os.fdopen(0, closefd=False), os.fdopen(1, "w", closefd=False)
        sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
        os.environ.clear()
        os.environ.update(message["environment"])
        tempfile.tempdir = None  # $TMPDIR may be another
        os.chdir(message["folder"])
        del sys.modules[__name__]
        run(message["arguments"])
        status = 0
    except SystemExit as ended:
        status = status_of(ended.code)
    except BaseException:
        traceback.print_exc()
    try:
        threading._shutdown()  # type: ignore[attr-defined]  # waits for threads as the interpreter does at its end
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        status = 120  # Python's own, of what it could not write
    finally:
        os._exit(status)


def status_of(code: object) -> int:
    """The status that `sys.exit(code)` ends Python with; a text is said."""
    if code is None or isinstance(code, int):
        return (code or 0) & 0xFF
    print(code, file=sys.stderr)  # noqa: T201
    return 1


def run(arguments: Sequence[str]) -> None:
    """As the main program."""
    options, rest = [], list(arguments)
    while rest[0] in ("-P", "-W"):
        options.append(rest.pop(0))
        if options[-1] == "-W":
            warnings.simplefilter(rest.pop(0))  # type: ignore[arg-type]
    first = rest.pop(0)
    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    if first == "-c":
        code = rest.pop(0)
        sys.argv = ["-c", *rest]
        sys.path[:0] = [] if "-P" in options else [""]
        vars(main)["__builtins__"] = __builtins__
        exec(compile(code, "<string>", "exec"), vars(main))
    elif first == "-m":
        module = rest.pop(0)
        sys.argv = ["-m", *rest]
        sys.path[:0] = [] if "-P" in options else [os.getcwd()]  # noqa: PTH109
        runpy._run_module_as_main(module)  # type: ignore[attr-defined]
    else:
        sys.argv = [first, *rest]
        sys.path[:0] = [] if "-P" in options else [str(Path(first).resolve().parent)]
        runpy.run_path(first, run_name="__main__")
