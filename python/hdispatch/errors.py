"""The exceptions that hdispatch raises, one class per kind of fault.

The C++ doors raise these too: `_C` looks the classes up here once, at import.
"""

from __future__ import annotations


class HdispatchError(RuntimeError):
    """Base of every error of this package. The message says what was found, what was expected and what to do."""


class BundleError(HdispatchError):
    """A bundle cannot be loaded: truncated, changed, of another schema or architecture. Nothing of it was loaded."""


class MissError(HdispatchError):
    """Strict mode only: no row of the launch table serves this call, or a guard of its row failed."""


class ArgumentError(HdispatchError, ValueError):
    """A call's argument has a wrong dtype, rank, size, stride, device or value. No output was written."""


class DriverError(HdispatchError):
    """The CUDA driver refused a call. The message holds the CUresult's number, name and text, the op and the row."""


class FunctionError(HdispatchError):
    """The TVM-FFI function of a row, or a foreign step of a sequence, raised an error; the message says which, and holds it.

    An error of CUDA's that it reports is a `DriverError`. What it had written before stays written.
    """


class BuildError(HdispatchError):
    """A kernel and config cannot become a launch record or an artifact; the message names the construct and why."""


def first_line(error: BaseException) -> str:
    """An error in one line: its type, and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
