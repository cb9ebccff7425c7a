"""A worker process that exchanges one JSON object per line: start, send, receive with a timeout, kill.

It calls `begin` first, which gives it the stream for its answers; whatever else it and its libraries print goes to standard
error, which is kept for when it ends unasked.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import IO, Any

from .errors import HdispatchError

#: Characters of what a process said last that errors show.
SAID = 2000
#: Seconds until a killed process must be gone: the driver ends its kernels first.
KILL_SECONDS = 120.0
#: prctl's, of Linux: a signal to have when the parent is gone.
_PR_SET_PDEATHSIG = 1


class WorkerGone(HdispatchError):
    """A process ended before it answered."""


class WorkerLate(HdispatchError):
    """A process has not answered in time, and still runs."""


class Child:
    """One such process and its pipes. One thread asks it; another one may kill it."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        env = dict(os.environ if environment is None else environment)
        self._process = subprocess.Popen(
            list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, bufsize=0, env=env
        )
        self._read = b""

    def send(self, message: Mapping[str, Any]) -> None:
        """A line to it. `WorkerGone` if nobody reads it."""
        try:
            left = memoryview(json.dumps(message).encode() + b"\n")
            while left:  # a signal may cut a long write short
                left = left[_pipe(self._process.stdin).write(left) :]
        except (BrokenPipeError, ValueError):
            raise self._gone() from None

    def receive(self, seconds: float | None = None) -> dict[str, Any]:
        """The next line from it. `WorkerGone` if it ends first, `WorkerLate` after so many seconds; None: no limit."""
        end = None if seconds is None else time.monotonic() + seconds
        while b"\n" not in self._read:
            try:
                waiting = select.poll()
                waiting.register(_pipe(self._process.stdout), select.POLLIN)
                left = None if end is None else max(0.0, end - time.monotonic()) * 1e3
                chunk = os.read(_pipe(self._process.stdout).fileno(), 1 << 16) if waiting.poll(left) else None
            except ValueError:  # closed by another thread
                chunk = b""
            if chunk is None:
                raise WorkerLate(f"a worker process has not answered for {seconds:g} s; it said: {self._said()}")
            if not chunk:
                raise self._gone()
            self._read += chunk
        line, _, self._read = self._read.partition(b"\n")
        found: dict[str, Any] = json.loads(line)
        return found

    def _gone(self) -> WorkerGone:
        try:
            self._process.wait(KILL_SECONDS)
        except subprocess.TimeoutExpired:  # it says no more, and does not end either
            self.kill()
        return WorkerGone(f"a worker process ended with status {self._process.wait()}; it said: {self._said()}")

    def _said(self) -> str:
        self._log.seek(0)
        return self._log.read().decode(errors="replace").strip()[-SAID:]

    def kill(self) -> None:
        """End the process, whatever it does; a request under way gets no answer. `HdispatchError` if it cannot be ended."""
        self._process.kill()
        try:
            self._process.wait(KILL_SECONDS)
        except subprocess.TimeoutExpired:
            raise HdispatchError(
                f"process {self._process.pid} has not ended {KILL_SECONDS:g} s after SIGKILL: the driver holds it; "
                "the GPU may need a reset"
            ) from None

    def close(self) -> None:
        """End the process and close its pipes."""
        self.kill()
        with contextlib.suppress(BrokenPipeError):  # what was not sent has no receiver
            _pipe(self._process.stdin).close()
        _pipe(self._process.stdout).close()
        self._log.close()


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    if pipe is None:
        raise HdispatchError("the worker process was started without a pipe")
    return pipe


# ---- in the process ----


def begin() -> IO[str]:
    """The stream for answers, which nothing else prints to. Ctrl-C is the parent's to act on; without a parent it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def answer(answers: IO[str], message: Mapping[str, Any]) -> None:
    """A line to the parent."""
    answers.write(json.dumps(message) + "\n")
    answers.flush()
