"""What `hdispatch bench serve` has to reach: ratios of times of a run, by [serve] of benchmarks/targets.toml in a checkout."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import HdispatchError

#: The file is in a checkout, not in a wheel.
FILE = Path(__file__).resolve().parents[3] / "benchmarks" / "targets.toml"
#: In a target: every batch or prefill that was measured.
EVERY = "every"


@dataclass(frozen=True)
class Judged:
    """A ratio that was measured, and its bound."""

    text: str
    ratio: float
    bound: float
    at_least: bool

    @property
    def met(self) -> bool:
        """Whether it is within the bound; NaN is not."""
        return self.ratio >= self.bound if self.at_least else self.ratio <= self.bound

    def __str__(self) -> str:
        """With the figure and the bound."""
        return f"{self.text} is {self.ratio:.3f}; at {'least' if self.at_least else 'most'} {self.bound}"


def load(file: Path = FILE) -> list[dict[str, Any]] | None:
    """The targets; None where there is no checkout. `HdispatchError` for a file that cannot be read."""
    if not file.is_file():
        return None
    try:
        found: list[dict[str, Any]] = tomllib.loads(file.read_text(encoding="utf-8"))["serve"]["ratios"]
    except (OSError, ValueError, KeyError) as error:
        raise HdispatchError(f"cannot read the targets in {file}: {error!r}") from error
    return found


def judge(result: Mapping[str, Any], targets: Sequence[Mapping[str, Any]]) -> list[Judged]:
    """The targets that are of a result's model, scheme and ranks, at the cells that both of their modes have.

    None of a result of a part of the model's layers.
    """
    if result.get("layers") is not None:
        return []
    return [judged for target in targets if _is_of(target, result) for judged in _judged(target, result["modes"])]


def _is_of(target: Mapping[str, Any], result: Mapping[str, Any]) -> bool:
    """What a target leaves out is any, but for the ranks: one."""
    named = {"ranks": 1, **{name: target[name] for name in ("model", "scheme", "ranks") if name in target}}
    return all(result.get(name, 1 if name == "ranks" else None) == value for name, value in named.items())


def _judged(target: Mapping[str, Any], modes: Mapping[str, Any]) -> Iterator[Judged]:
    """The ratios of one target: of a mode's time, or that at another batch, to one of another mode, or of its own."""
    of, to = target["of"], target.get("to", target["of"])
    if of not in modes or to not in modes:
        return
    name = "least" if "least" in target else "most"
    above, below = _times(modes[of], target["what"]), _times(modes[to], target["what"])
    bounds: dict[str, float] = dict(target[name])
    if EVERY in bounds:
        bounds = {**dict.fromkeys(above, bounds[EVERY]), **{cell: bound for cell, bound in bounds.items() if cell != EVERY}}
    for cell, bound in bounds.items():
        other = target.get("against", {}).get(cell, cell)
        if cell in above and other in below:
            text = f"{of} over {to}, {target['what']} {cell}" + (f" over {other}" if other != cell else "")
            yield Judged(text, above[cell] / below[other], bound, name == "least")


def _times(mode: Mapping[str, Any], what: str) -> dict[str, float]:
    """A mode's ms by batch or prefill, or the seconds that its engine took to start; what it imports is the same in all."""
    if what != "start-up":
        return dict({"batch": mode.get("batches", {}), "prefill": mode.get("prefills", {})}[what])
    started = mode.get("started", {})
    return {"s": started["init_s"]} if "init_s" in started else {}
