"""`hdispatch`: parses the command line, runs a subcommand, turns errors into one line and an exit code."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence

from ..bench.machine import package_version
from ..errors import HdispatchError
from . import bench, build, doctor, inspect, record, tune

#: Set to 1: an error shows its traceback.
TRACEBACK_VARIABLE = "HDISPATCH_TRACEBACK"

DESCRIPTION = """\
Launch compiled Helion, Triton and CuteDSL kernels from a frozen C++ table, with no Python per launch.

A build turns kernels and their tuned configs into a bundle, on any machine; serving loads the bundle:

  hdispatch build --target h200 --out bundle     kernels + configs -> bundle (no GPU needed)
  hdispatch inspect bundle                       what is in it
  hdispatch doctor bundle                        would it be served here, and if not, why
  hdispatch bench dispatch --bundle bundle       what a call costs, beside floors and peers
  hdispatch tune --help                          choosing the configs: candidates, measure, select
  hdispatch record --help                        what a run compiles with Triton, to be built into a bundle

  >>> import hdispatch
  >>> hdispatch.load("bundle")
  >>> hdispatch.ops.rms_norm_dynamic_per_token_quant(result, input, weight, scale, 1e-6, None, residual)
"""

EPILOG = """\
words:
  op        a named operation with a torch schema, e.g. rms_norm_dynamic_per_token_quant
  kernel    the source of one implementation of an op
  variant   one combination of dtypes and of optional arguments that are given, e.g. bfloat16+residual
  config    tuned parameters of a kernel
  bucket    an interval of M, the number of rows of a call, and of the integer that has a ladder beside M, if the op has one;
            a bucket chooses the config and never changes the answer
  record    what one compiled kernel needs to be launched: grid, parameters and guards as expressions in the call's sizes
  row       a key (op, variant, K, N, bucket) and the record that serves it
  bundle    the folder that serving loads: a manifest and compiled kernels

exit codes: 0 done; 1 an error, in one line on stderr; 2 a wrong command line; 130 interrupted.
HDISPATCH_TRACEBACK=1 shows where an error came from. HDISPATCH_BUNDLE is the default bundle: of load,
doctor, bench and the plug-ins for vLLM and SGLang, which HDISPATCH=1 switches on.
"""


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = argparse.ArgumentParser(
        "hdispatch", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    top.add_argument("--version", action="version", version=f"hdispatch {package_version('hdispatch')}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)
    for module in (build, inspect, doctor, bench, tune, record):
        module.add_parser(commands)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line, `sys.argv` if none is given, and return the exit code."""
    try:
        arguments = parser().parse_args(argv)
    except SystemExit as stop:  # argparse: 0 after --help, 2 for a wrong command line
        return stop.code if isinstance(stop.code, int) else 2
    try:
        code: int = arguments.run(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("\nhdispatch: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe has seen enough; nothing more may be written at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        return _report(error)
    return code


def _report(error: Exception) -> int:
    if os.environ.get(TRACEBACK_VARIABLE) == "1":
        traceback.print_exception(error)
    if isinstance(error, HdispatchError | OSError):
        print(f"hdispatch: error: {error}", file=sys.stderr)
    else:
        text = f"{type(error).__name__}: {error}"
        print(f"hdispatch: error: {text} (not foreseen; {TRACEBACK_VARIABLE}=1 shows where)", file=sys.stderr)
    return 1
