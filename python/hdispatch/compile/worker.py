"""The process that generates and compiles. It simulates the target GPU, and is therefore used for nothing else.

It reads and writes JSON, an object per line (see `hdispatch.child`): first `Settings`, then requests, each with one answer.

    {"unit": …, "tools": …}   a `Unit` to build   -> {"built": [...]}
    {"question": …}           a `Question`        -> {"configs": [...]}
    {"recorded": […], "sources": {…}}   lines of a recording   -> {"made": [...]}

`{"error": message, "detail": traceback}` says that it could not; `detail` is empty where the message says it all.
"""

from __future__ import annotations

import importlib
import json
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import child
from ..errors import BuildError
from . import target as targets
from .build_unit import Unit
from .store import Store


@dataclass(frozen=True)
class Settings:
    """Shared by every request of one process: the target, the build cache's folder, and further folders of modules."""

    target: dict[str, Any]
    store: str
    paths: list[str]


def main() -> None:
    """Answer requests from standard input until it ends."""
    answers = child.begin()
    settings = Settings(**json.loads(sys.stdin.readline()))
    sys.path += [path for path in settings.paths if path not in sys.path]
    target = targets.GpuTarget(**settings.target)
    targets.install(target)
    store = Store(Path(settings.store))
    for line in sys.stdin:
        child.answer(answers, _answer(json.loads(line), target, store))


def _answer(request: dict[str, Any], target: targets.GpuTarget, store: Store) -> dict[str, Any]:
    try:
        # Triton and Helion ask for the device when they are imported: not before `install`.
        if "question" in request:
            lists = importlib.import_module(f"{__package__}.candidate_lists")
            return {"configs": lists.answer(lists.Question(**request["question"]))}
        if "recorded" in request:
            compiler = importlib.import_module(f"{__package__}.recorded_compiler")
            return {"made": compiler.compile_recorded(request["recorded"], request["sources"], store)}
        builder = importlib.import_module(f"{__package__}.record_builder")
        return {"built": builder.build_records(Unit.from_json(request["unit"]), target, request["tools"], store)}
    except BuildError as error:
        return {"error": str(error), "detail": ""}
    except Exception as error:  # a DSL may raise anything; the parent process says which request it was
        return {"error": f"{type(error).__name__}: {error}", "detail": traceback.format_exc()}
