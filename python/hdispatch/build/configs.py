"""Config files and which of their entries serves a bucket: vLLM's format and vLLM's rule.

A file is a JSON list of `{"key": {...}, "config": {...}}`, e.g. with the key `{"hidden_size": 4096, "num_tokens": 16}`;
the op's `config_key` says which size each name stands for. The empty key is the default, used where nothing else is.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import BuildError
from ..opspec import OpSpec
from .target import GpuTarget

#: A GPU without a file of its own takes this one's, and the build says so.
FALLBACK = "nvidia_h200.json"


@dataclass(frozen=True)
class ConfigFile:
    """The entries of one file. `sizes` of an entry are by symbol: {"K": 4096, "M": 16}; empty for the default."""

    path: Path
    entries: tuple[tuple[dict[str, int], dict[str, Any]], ...]

    def pick(self, spec: OpSpec, shape: Mapping[str, int], edge: int) -> dict[str, Any]:
        """The config for a bucket of M up to `edge`.

        Among all entries the ones with the nearest sizes other than M (earlier names of `config_key` first, and the
        earlier entry of two equally near); among those the smallest M of at least `edge`, or else the largest.
        BuildError if the file has no entry.
        """
        symbols = [symbol for symbol in spec.config_key.values() if symbol != "M"]
        keyed = [(sizes, config) for sizes, config in self.entries if sizes]
        if not keyed:
            if not self.entries:
                raise BuildError(f"{self.path} has no entry; add one with the key {{}} to serve every shape")
            return self.entries[0][1]
        nearest = min((sizes for sizes, _ in keyed), key=lambda sizes: [abs(sizes[s] - shape[s]) for s in symbols])
        same = [(sizes, config) for sizes, config in keyed if all(sizes[s] == nearest[s] for s in symbols)]
        same.sort(key=lambda entry: entry[0].get("M", 0))
        return next((config for sizes, config in same if sizes.get("M", edge) >= edge), same[-1][1])


def read(path: Path, spec: OpSpec) -> ConfigFile:
    """Reads and checks a file. BuildError, naming the entry, for anything but structured keys with the op's names."""
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BuildError(f"cannot read the configs in {path}: {error}") from error
    if not isinstance(data, list):
        raise BuildError(f'{path} holds a JSON {type(data).__name__}; it takes a list of {{"key": {{...}}, "config": {{...}}}}')
    entries = [_entry(path, index, entry, spec) for index, entry in enumerate(data)]
    seen: list[dict[str, int]] = []
    for index, (sizes, _) in enumerate(entries):
        if sizes in seen:
            raise BuildError(f"{path}: entry {index} repeats the key of entry {seen.index(sizes)}: {data[index]['key']}")
        seen.append(sizes)
    return ConfigFile(path, tuple(entries))


def _entry(path: Path, index: int, entry: Any, spec: OpSpec) -> tuple[dict[str, int], dict[str, Any]]:
    if not isinstance(entry, dict) or not {"key", "config"} <= set(entry) or not isinstance(entry["config"], dict):
        raise BuildError(f'{path}: entry {index} is {entry!r:.80}; it takes {{"key": {{...}}, "config": {{...}}}}')
    key = entry["key"]
    expected = sorted(spec.config_key)
    if not isinstance(key, dict):
        raise BuildError(
            f"{path}: entry {index} has the key {key!r}; it takes an object with {expected}, or {{}} for the default"
        )
    if key and sorted(key) != expected:
        raise BuildError(f"{path}: entry {index} has the key {key}; {spec.name} takes {expected}, or {{}} for the default")
    for name, size in key.items():
        if type(size) is not int or size < 1:
            raise BuildError(f"{path}: entry {index} has {name} {size!r}; it takes an integer of at least 1")
    return {spec.config_key[name]: size for name, size in key.items()}, entry["config"]


def find(spec: OpSpec, target: GpuTarget, folder: Path) -> tuple[ConfigFile, str | None]:
    """The op's file for a GPU in a folder, and a note if it is another GPU's. BuildError if there is none."""
    for name in (target.config_file, FALLBACK):
        if (path := folder / name).is_file():
            note = f"{spec.name}: no configs for {target.name}, using {path}" if name != target.config_file else None
            return read(path, spec), note
    raise BuildError(f"{spec.name}: no configs; {folder} has neither {target.config_file} nor {FALLBACK}")


def installed(op: str) -> Path:
    """The folder of an op's configs that comes with hdispatch."""
    package = importlib.util.find_spec("hdispatch.configs")
    roots = list(package.submodule_search_locations or ()) if package else []
    if not roots:
        raise BuildError("hdispatch is installed without its configs; reinstall it")
    return Path(roots[0]) / op
