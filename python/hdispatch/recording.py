"""Recording what a run compiles with Triton: every specialization, as a line of JSON, for `hdispatch build --record`.

    with hdispatch.record("kernels.jsonl"):     # or: hdispatch record --out kernels.jsonl -- COMMAND
        serve()

A file holds an object per line, of two kinds: the text of a module that has kernels, `Source`, and a specialization of one of
its kernels, `Specialization`. Processes append to it; what is there twice counts once. Values that JSON does not have are
objects of one field, see `recorder.encode`. Triton is not imported here: the run does that, or not.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NotRequired, TypedDict

from .errors import HdispatchError
from .recorder import Recorder
from .typed_json import Mismatch, check, parse


class Source(TypedDict):
    """The text of a module, by the SHA-256 of its UTF-8 bytes."""

    line: Literal["source"]
    module: str
    sha256: str
    text: str


class Specialization(TypedDict):
    """What Triton compiled once.

    kernel      the function: `module` and `qualname` in it; `gluon` where it is one of Gluon's
    source_hash Triton's own hash of its source and of the functions and constants that it uses
    module_sha256  of the `Source` that it is in; "" where there is none
    key         what Triton keeps the compiled kernel by: types and properties of the arguments, constants, options
    signature   parameter -> Triton's type
    constants   pairs of a path to a parameter and its value
    attrs       pairs of a path to a parameter and what is proved of it
    options     of the compiler, all of them
    refused     given if the compiler refused it: the name of what it raised (recorder.py)
    """

    line: Literal["specialization"]
    module: str
    qualname: str
    source_hash: str
    module_sha256: str
    key: str
    signature: dict[str, Any]
    constants: list[Any]
    attrs: list[Any]
    options: dict[str, Any]
    capability: int
    triton: str
    refused: NotRequired[str]


Line = Source | Specialization


def read(files: Sequence[str | os.PathLike[str]]) -> tuple[dict[str, Source], list[Specialization]]:
    """The sources by their SHA-256, and the specializations, each once, of recordings.

    One that some run refused and another compiled counts as refused, in whatever order: the builder's compiler decides.
    `HdispatchError` naming file and line for one that cannot be read.
    """
    sources: dict[str, Source] = {}
    found: dict[tuple[str, str, str, str], Specialization] = {}
    for file in files:
        try:
            lines = Path(file).read_bytes().splitlines()
        except OSError as error:
            raise HdispatchError(f"{file}: cannot be read ({error.strerror}); is it a recording?") from error
        for number, text in enumerate(lines, 1):
            try:
                line: Any = parse(text)
                check(line, Line)
            except (ValueError, Mismatch) as error:
                raise HdispatchError(f"{file}: line {number} is none of a recording: {str(error).lstrip('. ')}") from error
            if line["line"] == "source":
                sources[line["sha256"]] = line
            else:
                key = (line["module"], line["qualname"], line["source_hash"], line["key"])
                if key not in found or ("refused" in line and "refused" not in found[key]):
                    found[key] = line
    return sources, list(found.values())


class record(Recorder):
    """Inside `with hdispatch.record(FILE):` every specialization that Triton compiles in this process is appended to FILE.

    Chains with what `triton.knobs.runtime.jit_post_compile_hook` is; a run that imports Triton in the block is recorded from
    then on. `count` is how many there were. A kernel that was called before the block is not compiled again, and missing: open
    the block first. `HdispatchError` if FILE cannot be written.
    """

    def __enter__(self) -> record:
        try:
            self.begin()
        except OSError as error:
            raise HdispatchError(f"cannot write the recording {self.file}: {error.strerror}") from error
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.end()
