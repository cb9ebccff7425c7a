"""`hdispatch record`: runs a command and writes down what it compiles with Triton."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from .. import recorder, recording
from ..errors import HdispatchError
from .text import count

DESCRIPTION = """\
Run COMMAND and append every specialization of a Triton kernel that it compiles, in any of its Python processes, to FILE:
source, signature, constants and options, a line of JSON each. Compile all of them for any GPU, on any machine, and serve them
from their first call:

  hdispatch record --out kernels.jsonl -- python serve.py
  hdispatch build --record kernels.jsonl --target h100 --out bundle
  >>> hdispatch.load("bundle")                      in the next run of serve.py

A kernel is recorded where this process meets it first, also where Triton's own cache has it. SIGTERM and SIGHUP are handed on
to COMMAND; when it has ended, what it compiled is told, and its exit code is this command's.

With --vllm-warmup no GPU is needed: SCRIPT registers kernels with vLLM's warm-up registry, as vLLM's layers do
(KERNEL.register_warmup(...)), and what vLLM would compile of them as it starts on a TARGET is compiled and recorded:

  hdispatch record --out kernels.jsonl --vllm-warmup register.py --target h100
"""

#: Runs in every Python process of the command, before anything else.
_SITECUSTOMIZE = """\
import sys
_folder = {folder!r}
sys.path[:] = [each for each in sys.path if each != _folder]
open(_folder + "/reached", "a").close()
_own = sys.modules.pop("sitecustomize")
try:
    import sitecustomize
except ModuleNotFoundError as error:
    if error.name != "sitecustomize":
        raise
    sys.modules["sitecustomize"] = _own  # Python looks for it there when this file ends
import importlib.util
_spec = importlib.util.spec_from_file_location("_hdispatch_recorder", {recorder!r})
_recorder = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_recorder)
_recorder.begin_in_process()
"""


def add_parser(commands: Any) -> None:
    """Declare the subcommand."""
    parser = commands.add_parser(
        "record",
        help="write down what a command compiles with Triton",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", metavar="FILE", type=Path, required=True, help="the recording, .jsonl; appended to")
    parser.add_argument("--vllm-warmup", metavar="SCRIPT", type=Path, help="in place of a command: registers vLLM's kernels")
    parser.add_argument("--target", metavar="NAME", help="the described GPU that --vllm-warmup compiles for, as h100")
    parser.add_argument("command", metavar="COMMAND", nargs=argparse.REMAINDER, help="-- and the command with its arguments")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command and say what it compiled; its exit code is ours."""
    command = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
    if arguments.vllm_warmup is not None:
        command = [*_warm_up(arguments.vllm_warmup, arguments.target), *command]
    elif arguments.target is not None:
        raise HdispatchError("--target is --vllm-warmup's: a command is recorded on the GPU that it runs on")
    if not command:
        raise HdispatchError("record takes a command: hdispatch record --out FILE -- python serve.py")
    file = arguments.out.absolute()
    with recording.record(file):  # whether it can be written shows now
        before = len(recording.read([file])[1])
    with tempfile.TemporaryDirectory(prefix="hdispatch-record-") as folder:
        Path(folder, "sitecustomize.py").write_text(_SITECUSTOMIZE.format(folder=folder, recorder=recorder.__file__))
        paths = [folder, *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), recorder.VARIABLE: str(file)}
        code = _run(command, environment)
        if not Path(folder, "reached").exists():
            print(
                "no Python process of the command was recorded: none began, or all with -I, -E or -S, which leave out "
                "PYTHONPATH or sitecustomize, by which recording begins",
                file=sys.stderr,
            )
    found = recording.read([file])[1]
    kernels = {(line["module"], line["qualname"]) for line in found}
    print(
        f"{file}: {count(len(found), 'specialization')} of {count(len(kernels), 'kernel')}, {len(found) - before} of them new"
    )
    return code if code >= 0 else 128 - code


def _run(command: list[str], environment: dict[str, str]) -> int:
    """The exit code of a command. SIGTERM and SIGHUP, by which supervisors end a server, are handed on to it."""
    processes: list[subprocess.Popen[bytes]] = []
    early: list[int] = []

    def hand_on(number: int, _frame: object) -> None:
        """Send a signal to the command, or note it until the command runs."""
        if processes:
            processes[0].send_signal(number)
        else:
            early.append(number)

    before = {number: signal.signal(number, hand_on) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        processes.append(subprocess.Popen(command, env=environment))
        for number in early:
            processes[0].send_signal(number)
        return _wait(processes[0])
    except OSError as error:
        raise HdispatchError(f"cannot run {command[0]}: {error.strerror}") from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(process: subprocess.Popen[bytes]) -> int:
    """The exit code. A server is ended by an interrupt: the terminal sends it to the command too, which ends as it likes."""
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue


def _warm_up(script: Path, target: str | None) -> list[str]:
    """The command that runs vLLM's warm-up of what a script registers."""
    from ..compile.target import DESCRIBED

    if target not in DESCRIBED:
        raise HdispatchError(f"--vllm-warmup takes --target, one of {', '.join(DESCRIBED)}; got {target}")
    if not script.is_file():
        raise HdispatchError(f"{script}: no such file; --vllm-warmup takes a Python script that registers vLLM's kernels")
    return [sys.executable, "-m", "hdispatch.cli.vllm_warmup", target, str(script)]
