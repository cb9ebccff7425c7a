"""Processes that compile are forked from one that has imported torch, Triton, Helion and CuteDSL: 5 to 12 s of CPU a process.

`serve` is that one, for one architecture; `client.py`'s text is what is started in place of a worker: it hands its pipes,
environment and folder over, and ends as the worker ends. A worker is killed when its client is gone. Whoever needs a process
of its own (another architecture, PYTHONPATH or hash seed) gets one.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

HERE = Path(__file__).parent
#: Architectures, and the target that a process believes in as it imports; a worker installs its own over it.
TARGETS = {"sm_80": "a100", "sm_90a": "h200", "sm_100a": "b200"}
#: What a worker's interpreter is started with.
FLAGS = (sys.executable, "-P", "-c")
#: Where the sockets are, for processes that tests start too.
FOLDER = "HDISPATCH_TEST_FORKED"
_PR_SET_PDEATHSIG = 1


def command(code: str) -> tuple[str, ...]:
    """The command of a worker that runs this code."""
    return (sys.executable, "-I", "-S", str(HERE / "forked_client.py"), code)


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[None]:
    """Processes to fork from, one an architecture; they import when they are first asked."""
    from hdispatch.compile import DESCRIBED, pool

    started = []
    for arch, target in TARGETS.items():
        environment = pool.environment(folder, DESCRIBED[target])
        program = f"import sys; sys.path.append({str(HERE)!r}); import forked; forked.serve({str(folder / arch)!r}, {target!r})"
        process = subprocess.Popen([*FLAGS, program], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=environment)
        started.append(process)
    for process in started:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n", f"a process to fork from ended with status {process.wait()}"
    os.environ[FOLDER] = str(folder)
    try:
        yield
    finally:
        os.environ.pop(FOLDER, None)
        for process in started:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()


# ---- in the process that is forked ----


def serve(path: str, target: str) -> None:
    """Fork for whoever connects, and tell each how its worker ended."""
    sys.path.remove(str(HERE))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listening.bind(path)
    listening.listen(64)
    os.write(1, b"ready\n")
    waiting = select.poll()
    waiting.register(listening, select.POLLIN)
    #: By a file descriptor to wait for: a client's socket, or its worker's process.
    workers: dict[int, tuple[socket.socket, int, int]] = {}
    asked = 0
    while True:
        (descriptor, _), *_ = waiting.poll()  # one at a time: what follows may close the next one's
        if descriptor == listening.fileno():
            client, _ = listening.accept()
            asked += 1
            imports(target, asked)
            pid = forked(client, [listening, *(each for each, _, _ in workers.values())])
            if pid is not None:
                ended = os.pidfd_open(pid)
                for each in (client.fileno(), ended):
                    workers[each] = (client, pid, ended)
                    waiting.register(each, select.POLLIN)
            continue
        client, pid, ended = workers[descriptor]
        if descriptor == client.fileno():  # it sends nothing more: it is gone
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        with contextlib.suppress(OSError):
            client.send(json.dumps(os.waitstatus_to_exitcode(status)).encode())
        for each in (client.fileno(), ended):
            del workers[each]
            waiting.unregister(each)
        client.close()
        os.close(ended)


def imports(target: str, asked: int) -> None:
    """What every worker imports; from the second one on what only some do, which a single one would not be repaid for."""
    if asked == 1:
        importlib.import_module("hdispatch.compile.worker")
        targets = importlib.import_module("hdispatch.compile.target")
        targets.install(targets.DESCRIBED[target])
    elif asked == 2:
        for name in ("helion", "cutlass.cute"):
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
    if asked < 3:
        gc.collect()
        gc.freeze()


def forked(client: socket.socket, others: Sequence[socket.socket]) -> int | None:
    """The process that runs what the client asks for; None if it is gone."""
    message, descriptors, _, _ = socket.recv_fds(client, 1 << 20, 3)
    if not message:
        client.close()
        return None
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        for each in (client, *others):
            each.close()
        work(json.loads(message), descriptors)
    for each in descriptors:
        os.close(each)
    return pid


def work(asked: dict[str, Any], descriptors: Sequence[int]) -> NoReturn:
    """As `python -P -c code` with the client's pipes, environment and folder."""
    status = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number, descriptor in enumerate(descriptors):
            os.dup2(descriptor, number)
            os.close(descriptor)
        sys.stdin, sys.stdout = os.fdopen(0, closefd=False), os.fdopen(1, "w", closefd=False)
        sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
        os.environ.clear()
        os.environ.update(asked["environment"])
        os.chdir(asked["folder"])
        sys.argv = ["-c"]
        exec(compile(asked["code"], "<string>", "exec"), {"__name__": "__main__"})
        status = 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(status)
