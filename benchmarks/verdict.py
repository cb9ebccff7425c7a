"""A target beside what was measured, and the text that reports share: the machine, verdicts, what did not run."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hdispatch.bench.results import write_text
from hdispatch.cli.text import machine_lines, table
from hdispatch.errors import HdispatchError

#: The targets of all benchmarks; the file says what each means.
TARGETS: dict[str, Any] = tomllib.loads(Path(__file__).with_name("targets.toml").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Verdict:
    """A figure that must be at least `wanted`. `measured` is None if it did not run; `note` says over what, or where.

    share  whether the figure is a share of a whole, not a ratio of times
    """

    text: str
    wanted: float
    measured: float | None
    note: str = ""
    share: bool = False

    @property
    def word(self) -> str:
        """`pass`, `miss` or `not run`."""
        if self.measured is None:
            return "not run"
        return "pass" if self.measured >= self.wanted else "miss"


def missed(verdicts: Iterable[Verdict]) -> bool:
    """Whether a target that was measured is missed."""
    return any(each.word == "miss" for each in verdicts)


# ---- text ----


def verdict_table(verdicts: Sequence[Verdict]) -> str:
    """A line for each target."""
    lines = []
    for each in verdicts:
        show = percent if each.share else ratio
        measured = "" if each.measured is None else show(each.measured)
        lines.append([each.text, f"≥ {show(each.wanted)}", measured, each.word, each.note])
    return table(("target", "wanted", "measured", "verdict", "over, or where"), lines)


def ratio(value: float) -> str:
    """`1.25 ×`."""
    return f"{value:.2f} ×"


def percent(value: float) -> str:
    """`75 %`; 99.996 % is not written as 100 %."""
    return f"{100 * value:.0f} %" if value in (0, 1) or round(value, 2) != 1 else f"{100 * value:.3f} %"


def run_lines(machine: Mapping[str, Any]) -> list[str]:
    """The machine of a run, and its bundle."""
    bundle = machine["bundle"]
    return [*machine_lines(machine), f"bundle for {bundle['target']}, {bundle['rows']} rows; {machine['rounds']} rounds"]


def not_run(lines: Sequence[str]) -> str:
    """The section of what did not run; empty if all did."""
    return "\n".join(["not run", *(f"  {line}" for line in lines)]) if lines else ""


# ---- files ----


def write_json(result: Mapping[str, Any], file: Path) -> None:
    """Write a result, a line for each entry of its lists."""
    parts = [f"{json.dumps(name)}: {_entries(value)}" for name, value in result.items()]
    write_text("{" + ",\n".join(parts) + "}\n", file)


def _entries(value: object) -> str:
    if isinstance(value, list) and value:
        return "[\n" + ",\n".join(json.dumps(each) for each in value) + "\n]"
    return json.dumps(value)


def require_folder(*files: Path | None) -> None:
    """HdispatchError, before anything is measured, for a file whose folder does not exist."""
    for file in files:
        if file and not file.resolve().parent.is_dir():
            raise HdispatchError(f"cannot write {file}: {file.parent} is not a folder")
