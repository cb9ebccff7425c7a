"""The process that generates and compiles: it believes that the target GPU is present, and so is used for nothing else.

Speaks JSON, one object per line: first what `Setup` holds, then one unit per line, each answered by `{"built": [...]}` or
`{"error": message, "detail": traceback}`. Answers go to the standard output that the process was started with; whatever
the DSLs print goes to standard error.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import BuildError
from . import target as targets
from .build_unit import Unit
from .store import Store


@dataclass(frozen=True)
class Setup:
    """What every unit of one build shares. `paths` are looked in for modules last."""

    target: dict[str, Any]
    store: str
    paths: list[str]

    def to_line(self) -> str:
        """As the worker's first line."""
        return json.dumps(asdict(self)) + "\n"


def main() -> None:
    """Serves units from standard input until it ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    setup = Setup(**json.loads(sys.stdin.readline()))
    sys.path += [path for path in setup.paths if path not in sys.path]
    target = targets.GpuTarget(**setup.target)
    targets.install(target)
    store = Store(Path(setup.store))
    for line in sys.stdin:
        answers.write(json.dumps(_answer(json.loads(line), target, store)) + "\n")
        answers.flush()


def _answer(request: dict[str, Any], target: targets.GpuTarget, store: Store) -> dict[str, Any]:
    try:
        # Triton and Helion ask for the device when they are imported: not before `install`.
        builder = importlib.import_module(f"{__package__}.record_builder")
        built = builder.build_records(Unit.from_json(request["unit"]), target, request["tools"], store)
    except BuildError as error:
        return {"error": str(error), "detail": ""}
    except Exception as error:  # a DSL may raise anything; the parent process says which unit it was
        return {"error": f"{type(error).__name__}: {error}", "detail": traceback.format_exc()}
    return {"built": built}
