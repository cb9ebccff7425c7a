"""The times that tuning measured for a bundle's configs, from the file that `tune select` writes beside the configs.

Rows carry it, and `inspect` shows by how much their kernel won against those of other backends.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from ..errors import BuildError
from ..manifest import Record, Tuned
from ..opspec import KEY_SYMBOLS, OpSpec
from ..typed_json import Mismatch, check, parse
from .configs import argument_of, key_arguments


def companion(path: Path) -> Path:
    """The file of the measurements of a config file."""
    return path.with_suffix(".tuned.json")


class _Time(TypedDict):
    """The measurement of an entry of the config file, as far as rows carry it.

    variant: of which it is; where it is missing, the op has one, or the file is an older one: then those of the key's values.
    """

    key: dict[str, int]
    variant: NotRequired[str]
    backend: str
    config: dict[str, Any]
    us: float
    backends: NotRequired[dict[str, float]]


class _Companion(TypedDict):
    """The file, likewise."""

    variants: list[str]
    times: list[_Time]


class Measurements:
    """The measurements of one config file; none where it has not been tuned."""

    def __init__(self, spec: OpSpec, path: Path) -> None:
        """BuildError if there is a file and it cannot be read."""
        self.spec = spec
        self.named = set(spec.config_key.values()) & set(KEY_SYMBOLS) - {"M"}
        self.variants: frozenset[str] = frozenset()
        #: By sizes; each with the values of arguments that it is for.
        self.times: dict[tuple[tuple[str, int], ...], list[tuple[dict[str, int], _Time]]] = {}
        if not (file := companion(path)).is_file():
            return
        try:
            data = parse(file.read_bytes())
            check(data, _Companion)
            self.variants = frozenset(data["variants"])
            for time in data["times"]:
                known = {spec.config_key.get(name, name): size for name, size in time["key"].items()}
                arguments = {name: known.pop(name) for name in key_arguments(spec) if name in known}
                self.times.setdefault(tuple(sorted(known.items())), []).append((arguments, time))
        except (OSError, ValueError, Mismatch) as error:
            raise BuildError(
                f"cannot read the measurements in {file}: {str(error).lstrip('.')}; select once more, or remove it"
            ) from error

    def of(self, variant: str, shape: Mapping[str, int], edges: Mapping[str, int], record: Record) -> Tuned | None:
        """The times of a row's record at its bucket's upper edges; None if this variant or config was not measured."""
        time = self._time(variant, shape, edges)
        if time is None or (time["backend"], time["config"]) != (record["backend"], record["config"]):
            return None
        others = {name: us for name, us in time.get("backends", {}).items() if name != record["backend"]}
        return {"us": time["us"], "others": others}

    def by_backend(self, variant: str, shape: Mapping[str, int], edges: Mapping[str, int]) -> dict[str, float]:
        """The time of the best config of each backend at a bucket's upper edges, in µs; empty where it was not measured."""
        time = self._time(variant, shape, edges)
        return {} if time is None else {time["backend"]: time["us"], **time.get("backends", {})}

    def _time(self, variant: str, shape: Mapping[str, int], edges: Mapping[str, int]) -> _Time | None:
        sizes = {symbol: size for symbol, size in shape.items() if symbol in self.named} | dict(edges)
        if variant not in self.variants:
            return None
        chosen = self.spec.variant(variant)
        values = {name: argument_of(chosen, name) for name in key_arguments(self.spec)}
        fitting = [
            (arguments, time)
            for arguments, time in self.times.get(tuple(sorted(sizes.items())), ())
            if arguments.items() <= values.items() and time.get("variant", variant) == variant
        ]
        return max(fitting, key=lambda found: ("variant" in found[1], len(found[0])))[1] if fitting else None
