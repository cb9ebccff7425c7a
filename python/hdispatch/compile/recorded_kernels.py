"""The Triton kernels of a recording -> cubins and Triton's metadata for a target, from the cache or from worker processes."""

from __future__ import annotations

import json
import platform
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from .. import recording
from ..errors import BuildError
from ..manifest import Recorded, Refused
from ..recording import Specialization
from .pool import Pool, WorkerLost
from .store import Store, digest
from .target import GpuTarget
from .versions import tool_versions

#: Specializations of one module that a worker process is asked for at once.
_AT_ONCE = 8


class Made(TypedDict):
    """One specialization: the SHA-256 of its cubin and Triton's metadata as JSON; or the reason for none, else "".

    `refused` is the compiler's message where it refused the specialization, as it did in the run that was recorded.
    """

    file: str
    metadata: str
    problem: str
    refused: NotRequired[str]


@dataclass
class RecordedKernels:
    """What a recording became.

    entries, refused  what the manifest has of it
    tools             the versions of what compiled it
    too_large         specializations that launch on no such GPU, by kernel, bytes of shared memory and those that there are
    problems          by kernel, why it could not be built again, and how many of its specializations
    """

    entries: list[Recorded] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)
    tools: dict[str, str] = field(default_factory=dict)
    cached: int = 0
    too_large: Counter[tuple[str, int, int]] = field(default_factory=Counter)
    problems: Counter[tuple[str, str]] = field(default_factory=Counter)

    def notes(self) -> list[str]:
        """A line of text for each thing that somebody should know."""
        notes = [f"{kernel}: {_count(n)} not built: {why}" for (kernel, why), n in self.problems.items()]
        notes += [
            f"{kernel}: {_count(n)}: {asked} bytes of shared memory, of {there} that there are: a launch raises OutOfResources"
            for (kernel, asked, there), n in self.too_large.items()
        ]
        refused = Counter((each["kernel"], each["error"]) for each in self.refused)
        notes += [
            f"{kernel}: {_count(n)} refused by the compiler, as in the run: {error}" for (kernel, error), n in refused.items()
        ]
        return notes


def _count(number: int) -> str:
    return f"{number} recorded specialization{'s' if number > 1 else ''}"


def build_recorded(
    files: Sequence[Path],
    target: GpuTarget,
    store: Store,
    workers: Pool,
    jobs: int,
    progress: Callable[[int, int, str], None] | None = None,
) -> RecordedKernels:
    """Compiles what recordings hold. BuildError if they hold nothing, or nothing of it can be built."""
    sources, lines = recording.read(files)
    if not lines:
        raise BuildError(f"{', '.join(map(str, files))}: nothing was recorded; was Triton used before the recording began?")
    found = RecordedKernels(tools=tool_versions("triton", target))
    keys = [_key(line, target, found.tools) for line in lines]
    made: dict[int, Made] = {}
    for index, key in enumerate(keys):
        kept = store.get("recorded", key, Made)
        if kept is not None and ("refused" in kept or store.has_blob(kept["file"])):
            made[index] = kept
    found.cached = len(made)
    chunks = _chunks(lines, [index for index in range(len(lines)) if index not in made])
    if progress and chunks:
        modules = len({line["module"] for line in lines})
        progress(len(made), len(lines), f"compiling recorded kernels of {modules} module{'s' if modules > 1 else ''}")

    def ask(position: int) -> list[Made]:
        chunk = [lines[index] for index in chunks[position]]
        needed = {line["module_sha256"] for line in chunk} & sources.keys()
        request = {"recorded": chunk, "sources": {name: sources[name] for name in needed}}
        try:
            answer = workers.ask(chunk[0]["module"], request)
        except WorkerLost as error:  # its compiler took the process along: the other chunks have another one
            return [{"file": "", "metadata": "", "problem": str(error)} for _ in chunk]
        answered: list[Made] = answer["made"]
        return answered

    for position, answer in workers.map(ask, len(chunks), jobs) if chunks else ():
        for index, one in zip(chunks[position], answer, strict=True):
            made[index] = one
            if not one["problem"]:
                store.put("recorded", keys[index], one)
        if progress:
            progress(len(made), len(lines), name_of(lines[chunks[position][0]]))
    for index, line in enumerate(lines):
        _add(found, line, made[index], target)
    if not found.entries and not found.refused:
        raise BuildError(f"nothing recorded can be built: {'; '.join(found.notes())}")
    return found


def name_of(line: Specialization) -> str:
    """A kernel as manifests call it."""
    return f"{line['module']}.{line['qualname']}"


def _chunks(lines: Sequence[Specialization], missing: Sequence[int]) -> list[list[int]]:
    by_module: dict[str, list[int]] = {}
    for index in missing:
        by_module.setdefault(lines[index]["module"], []).append(index)
    return [each[at : at + _AT_ONCE] for each in by_module.values() for at in range(0, len(each), _AT_ONCE)]


def _key(line: Specialization, target: GpuTarget, tools: Mapping[str, str]) -> str:
    data: dict[str, Any] = {"line": line, "target": target.to_json(), "tools": dict(tools)}
    return digest(data | {"python": platform.python_version()})


def _add(found: RecordedKernels, line: Specialization, made: Made, target: GpuTarget) -> None:
    name = name_of(line)
    if made["problem"]:
        found.problems[name, made["problem"]] += 1
        return
    if "refused" in made:
        found.refused.append(
            {
                "kernel": name,
                "source_hash": line["source_hash"],
                "key": line["key"],
                "error": line["refused"],
                "message": made["refused"],
            }
        )
        return
    shared = json.loads(made["metadata"])["shared"]
    if shared > target.shared_memory:
        found.too_large[name, shared, target.shared_memory] += 1
    found.entries.append(
        {
            "kernel": name,
            "source_hash": line["source_hash"],
            "key": line["key"],
            "parameters": [*line["signature"]],
            "signature": line["signature"],
            "constants": line["constants"],
            "attrs": line["attrs"],
            "options": line["options"],
            "file": made["file"],
            "metadata": made["metadata"],
        }
    )
