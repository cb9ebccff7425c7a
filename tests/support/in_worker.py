"""Runs functions in a process that believes in an H200, as the build's workers do; the test process stays clean."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import forked
from hdispatch.compile import DESCRIBED, pool
from hdispatch.compile.target import install

HERE = Path(__file__).parent
BOOT = f"import sys; sys.path.append({str(HERE)!r}); import in_worker; in_worker.serve()"


class InWorker:
    """One such process. `call("module:function", *args)` runs there with JSON arguments and returns the JSON result."""

    def __init__(self) -> None:
        self.scratch = tempfile.TemporaryDirectory(prefix="hdispatch-test-")
        environment = pool.environment(Path(self.scratch.name), DESCRIBED["h200"])
        command = forked.worker(BOOT)
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)

    def call(self, function: str, *args: Any) -> Any:
        """The result of `module:function`; RuntimeError with its error's type and text if it raises."""
        self.process.stdin.write(json.dumps({"function": function, "args": args}) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline() or '{"error": "the process died"}')
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["result"]

    def close(self) -> None:
        """Ends the process."""
        self.process.stdin.close()
        self.process.wait(timeout=60)
        self.process.stdout.close()
        self.scratch.cleanup()


def serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    install(DESCRIBED["h200"])
    for line in sys.stdin:
        request = json.loads(line)
        module, _, name = request["function"].partition(":")
        try:
            answer = {"result": getattr(importlib.import_module(module), name)(*request["args"])}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
