"""Config files and which of their entries serves a bucket: vLLM's format and vLLM's rule.

A file is a JSON list of `{"key": {...}, "config": {...}}`, e.g. with the key `{"hidden_size": 4096, "num_tokens": 16}`;
the op's `config_key` says which size each name stands for. A key without a size's name is for the rows that serve every
size of it; the empty key is the default, used where nothing else is. `"backend": "triton"` beside the key says which of
the op's kernels the config is for, if not the first. `"without": "cutedsl"` marks entries that stand in for their sizes'
others where that backend is not installed.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import BuildError
from ..opspec import OpSpec
from .target import GpuTarget

#: A GPU without a file of its own takes this one's, and the build says so.
FALLBACK = "nvidia_h200.json"


@dataclass(frozen=True)
class ConfigEntry:
    """One entry of a file. `sizes` of its key are by symbol: {"K": 4096, "M": 16}; empty for the default.

    backend is that of the kernel that the config is for, None for the op's first one; without, if given, the backend that
    has to be absent for the entry to count.
    """

    sizes: dict[str, int]
    config: dict[str, Any]
    backend: str | None = None
    without: str | None = None

    @property
    def shape(self) -> dict[str, int]:
        """The sizes besides M."""
        return {symbol: size for symbol, size in self.sizes.items() if symbol != "M"}


@dataclass(frozen=True)
class ConfigFile:
    """The entries of one file."""

    path: Path
    entries: tuple[ConfigEntry, ...]

    def available(self, backends: Collection[str], first: str) -> ConfigFile:
        """The file with the entries that count where only these backends are installed.

        first  the backend of entries that name none

        Where no entry is left, those for all backends: building them says what is missing.
        """
        stand_ins = [e for e in self.entries if e.without and e.without not in backends and (e.backend or first) in backends]
        replaced = [entry.shape for entry in stand_ins]
        usual = [entry for entry in self.entries if not entry.without]
        kept = [e for e in usual if (e.backend or first) in backends and e.shape not in replaced]
        return ConfigFile(self.path, tuple(stand_ins + kept) or tuple(usual))

    def pick(self, spec: OpSpec, shape: Mapping[str, int], edge: int) -> ConfigEntry:
        """The entry for a bucket of M up to `edge`.

        For a shape with all its sizes: among the entries with sizes the ones with the nearest ones (earlier names of
        `config_key` first, and the earlier entry of two equally near). For a shape that leaves sizes out: the entries that
        leave out the same. Among those the smallest M of at least `edge`, or else the largest. Where there are none: the
        default, and of a file without one any entry. BuildError if the file has no entry.
        """
        if not self.entries:
            raise BuildError(f"{self.path} has no entry; add one with the key {{}} to serve every shape")
        symbols = [symbol for symbol in spec.config_key.values() if symbol != "M"]
        given = [symbol for symbol in symbols if symbol in shape]
        # Sizes that a file's keys never name are served by all of its entries.
        like = [e for e in self.entries if e.sizes and set(e.shape) == set(given)]
        default = next((entry for entry in self.entries if not entry.sizes), None)
        if not like:
            return default or self.pick(spec, self._complete(symbols), edge)
        nearest = min((e.sizes for e in like), key=lambda sizes: [abs(sizes[s] - shape[s]) for s in given])
        same = [entry for entry in like if all(entry.sizes[s] == nearest[s] for s in given)]
        same.sort(key=lambda entry: entry.sizes.get("M", 0))
        return next((entry for entry in same if entry.sizes.get("M", edge) >= edge), same[-1])

    def _complete(self, symbols: list[str]) -> dict[str, int]:
        """The sizes of the entry that has the largest ones."""
        return max(
            ({s: e.sizes[s] for s in symbols if s in e.sizes} for e in self.entries), key=lambda sizes: [*sizes.values()]
        )


def read(path: Path, spec: OpSpec) -> ConfigFile:
    """Reads and checks a file. BuildError, naming the entry, for anything but structured keys with the op's names."""
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BuildError(f"cannot read the configs in {path}: {error}") from error
    if not isinstance(data, list):
        raise BuildError(f'{path} holds a JSON {type(data).__name__}; it takes a list of {{"key": {{...}}, "config": {{...}}}}')
    entries = [_entry(path, index, entry, spec) for index, entry in enumerate(data)]
    seen: list[tuple[dict[str, int], str | None]] = []
    for index, entry in enumerate(entries):
        if (key := (entry.sizes, entry.without)) in seen:
            raise BuildError(f"{path}: entry {index} repeats the key of entry {seen.index(key)}: {data[index]['key']}")
        seen.append(key)
    return ConfigFile(path, tuple(entries))


def _entry(path: Path, index: int, entry: Any, spec: OpSpec) -> ConfigEntry:
    if not isinstance(entry, dict) or not {"key", "config"} <= set(entry) or not isinstance(entry["config"], dict):
        raise BuildError(f'{path}: entry {index} is {entry!r:.80}; it takes {{"key": {{...}}, "config": {{...}}}}')
    key = entry["key"]
    expected = sorted(spec.config_key)
    if not isinstance(key, dict):
        raise BuildError(
            f"{path}: entry {index} has the key {key!r}; it takes an object with {expected}, or {{}} for the default"
        )
    if not set(key) <= set(expected):
        raise BuildError(
            f"{path}: entry {index} has the key {key}; {spec.name} takes {expected}, fewer for sizes that are left open, "
            "or {} for the default"
        )
    for name, size in key.items():
        if type(size) is not int or size < 1:
            raise BuildError(f"{path}: entry {index} has {name} {size!r}; it takes an integer of at least 1")
    for field in ("backend", "without"):
        if (name := entry.get(field)) is not None and not isinstance(name, str):
            raise BuildError(f'{path}: entry {index} has {field} {name!r}; it takes the name of a backend such as "triton"')
    sizes = {spec.config_key[name]: size for name, size in key.items()}
    return ConfigEntry(sizes, entry["config"], entry.get("backend"), entry.get("without"))


def find(spec: OpSpec, target: GpuTarget, folder: Path) -> tuple[ConfigFile, str | None] | None:
    """The op's file for a GPU in a folder, and a note if it is another GPU's; None if the folder has neither."""
    for name in (target.config_file, FALLBACK):
        if (path := folder / name).is_file():
            note = f"{spec.name}: no configs for {target.name}, using {path}" if name != target.config_file else None
            return read(path, spec), note
    return None


def installed(op: str) -> Path:
    """The folder of an op's configs that comes with hdispatch."""
    package = importlib.util.find_spec("hdispatch.configs")
    roots = list(package.submodule_search_locations or ()) if package else []
    if not roots:
        raise BuildError("hdispatch is installed without its configs; reinstall it")
    return Path(roots[0]) / op
