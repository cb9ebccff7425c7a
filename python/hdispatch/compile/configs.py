"""Config files and which of their entries serves a bucket: vLLM's format and vLLM's rule.

A file is a JSON list of `{"key": {...}, "config": {...}}`, e.g. with the key `{"hidden_size": 4096, "num_tokens": 16}`;
the op's `config_key` says which size each name stands for. A key without a size's name is for the rows that serve every
size of it; the empty key is the default, used where nothing else is. `"backend": "triton"` beside the key says which of
the op's kernels the config is for, if not the first. `"without": "cutedsl"` marks entries that stand in for their sizes'
others where that backend is not installed. `"backend": "fallback"`, with the config {}, says that no row serves those buckets:
their calls run the op's fallback, which is faster there.

A key may also name arguments that tell variants apart: integers and flags that are compiled in (`group_size`), and tensors that
may be absent (`"q_weight": 0` where it is, 1 where it is not). Such an entry is for the variants with that value, and before
others for the same sizes. A value that no variant has is refused: its entry could never serve.

vLLM's own files are read as they are. Their keys may also name the sizes K, N and M themselves and what the op's `foreign_key`
knows. Before 0.33 a file was an object of configs by keys in one string, `hidden_size_4096_num_tokens_16`. Their configs are
Helion's.
"""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import BuildError
from ..opspec import KEY_SYMBOLS, BoolArg, IntArg, OpSpec, Variant
from ..typed_json import Mismatch, parse
from .target import GpuTarget
from .versions import PACKAGES

#: A GPU without a config file takes this one, and the build says so.
FALLBACK = "nvidia_h200.json"

#: The backend of entries whose buckets get no row.
NO_ROW = "fallback"

#: Sizes that a key may have: those that a row's key can hold.
LARGEST_SIZE = 2**32 - 1
#: `hidden_size_4096_num_tokens_16`, a part at a time.
_PART = re.compile(r"([A-Za-z][A-Za-z_]*?)_(-?[0-9]+)(?:_|$)")
#: Options that every config of Helion has, and none of another backend.
_HELION = "block_sizes"


@dataclass(frozen=True)
class ConfigEntry:
    """One entry of a file. `sizes` of its key are by symbol: {"K": 4096, "M": 16}; empty for the default. Of an op with a
    second ladder they may have the name of its integer too.

    backend is that of the kernel that the config is for, None for the op's first one; without, if given, the backend that
    has to be absent for the entry to count. arguments: values, as `argument_of` gives them, that the entry is for, none for all
    of them. label: what errors call it, "entry 3"; raw: the entry as the file has it.
    """

    sizes: dict[str, int]
    config: dict[str, Any]
    backend: str | None = None
    without: str | None = None
    arguments: dict[str, int] = field(default_factory=dict)
    label: str = field(default="", compare=False)
    raw: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def shape(self) -> dict[str, int]:
        """The sizes of a row: K and N."""
        return {symbol: size for symbol, size in self.sizes.items() if symbol in KEY_SYMBOLS and symbol != "M"}


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
        backends = {*backends, NO_ROW}
        stand_ins = [e for e in self.entries if e.without and e.without not in backends and (e.backend or first) in backends]
        replaced = [(entry.shape, entry.arguments) for entry in stand_ins]
        usual = [entry for entry in self.entries if not entry.without]
        kept = [e for e in usual if (e.backend or first) in backends and (e.shape, e.arguments) not in replaced]
        return ConfigFile(self.path, tuple(stand_ins + kept) or tuple(usual))

    def for_variant(self, variant: Variant) -> ConfigFile:
        """The file without the entries that are for other values of compiled-in arguments; if that leaves none, with them.

        Those for this variant's values come first: where they reach a bucket, one of them is picked.
        """
        kept = [e for e in self.entries if all(argument_of(variant, name) == value for name, value in e.arguments.items())]
        kept.sort(key=lambda entry: -len(entry.arguments))
        return ConfigFile(self.path, tuple(kept) or self.entries)

    def require_backends(self, backends: Collection[str]) -> None:
        """BuildError, naming the entry, if one is for a backend that is not among the op's, or stands in for such a one."""
        for entry in self.entries:
            for name in (entry.backend, entry.without):
                if name is not None and name not in {*backends, NO_ROW}:
                    raise BuildError(f"{self.path}: {entry.label} is for {name!r}; the op has kernels of {sorted(backends)}")

    def pick(
        self, spec: OpSpec, shape: Mapping[str, int], edges: Mapping[str, int], variant: Variant | None = None
    ) -> ConfigEntry:
        """The entry for a bucket up to `edges`, as `Ladders.edges` gives them; the op's typical variant is meant if none is.

        For a shape with all its sizes: among the entries with sizes the ones with the nearest ones (earlier names of
        `config_key` first, and the earlier entry of two equally near). For a shape that leaves sizes out: the entries that
        leave out the same. Of these the ones that name the most of the variant's arguments and reach the edges. Among those the
        smallest M of at least the edge, or else the largest; then likewise the second ladder's integer. Where there are none:
        the default, and of a file without one any entry. BuildError if the file has no entry.
        """
        if not self.entries:
            raise BuildError(f"{self.path} has no entry; add one with the key {{}} to serve every shape")
        entries = self.entries
        if any(entry.arguments for entry in entries):
            entries = self.for_variant(variant or spec.typical_variant()).entries
        symbols = [symbol for symbol in spec.config_key.values() if symbol in KEY_SYMBOLS[1:]]
        given = [symbol for symbol in symbols if symbol in shape]
        # Sizes that a file's keys never name are served by all of its entries.
        like = [e for e in entries if e.sizes and set(e.shape) == set(given)]
        default = next((entry for entry in entries if not entry.sizes), None)
        if not like:
            return default or self.pick(spec, _complete(entries, symbols), edges, variant)
        nearest = min((e.sizes for e in like), key=lambda sizes: [abs(sizes[s] - shape[s]) for s in given])
        same = [entry for entry in like if all(entry.sizes[s] == nearest[s] for s in given)]
        if spec.second is not None:  # each M has entries of its own there: arguments without any were not measured at it
            same = _at_edge(same, "M", edges["M"])
        same = _most_arguments(same, edges)
        for name, edge in edges.items():
            same = _at_edge(same, name, edge)
        return same[0]


def key_arguments(spec: OpSpec) -> list[str]:
    """The arguments that keys may name: those whose values tell variants apart, but for dtypes."""
    names = [arg.name for arg in spec.args if isinstance(arg, IntArg | BoolArg) and arg.values is not None]
    return names + [arg.name for arg in spec.tensors() if arg.optional]


def _values_of(spec: OpSpec, name: str) -> list[int]:
    """The values that variants have of such an argument, as `argument_of` gives them."""
    values = next((arg.values for arg in spec.args if arg.name == name and isinstance(arg, IntArg | BoolArg)), None)
    return [0, 1] if values is None else sorted(map(int, values))


def argument_of(variant: Variant, name: str) -> int | None:
    """A variant's value of such an argument: of a tensor 1, or 0 where it is absent. None for an integer that is absent."""
    if name in variant.static:
        return int(variant.static[name])
    return 1 if name in variant.dtypes else 0 if name in variant.none else None


def _complete(entries: Iterable[ConfigEntry], symbols: list[str]) -> dict[str, int]:
    """The sizes of the entry that has the largest ones."""
    return max(({s: e.sizes[s] for s in symbols if s in e.sizes} for e in entries), key=lambda sizes: [*sizes.values()])


def _most_arguments(entries: list[ConfigEntry], edges: Mapping[str, int]) -> list[ConfigEntry]:
    """Of a variant's entries for one shape those that name the most arguments and reach a bucket's edges; else all.

    One entry serves the buckets up to its edge, so others' edges between must not come before it.
    """
    for arguments in sorted((entry.arguments for entry in entries), key=len, reverse=True):
        found = [entry for entry in entries if entry.arguments == arguments]
        if any(all(entry.sizes.get(name, edge) >= edge for name, edge in edges.items()) for entry in found):
            return found
    return entries


def _at_edge(entries: list[ConfigEntry], name: str, edge: int) -> list[ConfigEntry]:
    """The entries for the smallest value of at least an edge, else for the largest; one without the name serves every value."""
    found = sorted(entries, key=lambda entry: entry.sizes.get(name, 0))
    best = next((entry for entry in found if entry.sizes.get(name, edge) >= edge), found[-1])
    return [entry for entry in found if entry.sizes.get(name) == best.sizes.get(name)]


def read(path: Path, spec: OpSpec) -> ConfigFile:
    """Reads and checks a file of one of vLLM's formats or ours.

    Raises BuildError, naming the file and the entry, for one that holds anything else: a key, field, backend or size that does
    not exist, a name or key twice, a value that is no number, deep nesting.
    """
    try:
        data = parse(path.read_bytes())
    except Mismatch as error:
        raise BuildError(f"{path}: {_entry_of(str(error))}") from error
    except (OSError, ValueError) as error:
        raise BuildError(f"cannot read the configs in {path}: {error}") from error
    entries = [_entry(f"{path}: {label}", label, raw, spec) for label, raw in _raw_entries(path, data)]
    seen: dict[tuple[object, ...], str] = {}
    for entry in entries:
        written = _meant(entry.raw["key"])
        # Different keys of vLLM's may come to the same sizes here: heads of q and k, elements of a row. The first counts.
        foreign = written if spec.foreign_key is not None and spec.foreign_key(written) != written else {}
        key = (*(tuple(sorted(part.items())) for part in (entry.sizes, entry.arguments, foreign)), entry.without)
        if key in seen:
            raise BuildError(f"{path}: {entry.label} repeats the key of {seen[key]}: {entry.raw['key']}")
        seen[key] = entry.label
    return ConfigFile(path, tuple(entries))


def _entry_of(mismatch: str) -> str:
    """`[3].config repeats …` -> `entry 3.config repeats …`; of an older file `.default.x repeats …` -> `entry default.x …`."""
    if match := re.match(r"\[([0-9]+)\](.*)", mismatch, re.DOTALL):
        return f"entry {match[1]}{match[2]}"
    return f"entry {mismatch[1:]}" if mismatch.startswith(".") else f"the file{mismatch}"


def _raw_entries(path: Path, data: object) -> Iterator[tuple[str, Any]]:
    """The entries of a file, and what to call each."""
    if isinstance(data, list):
        for index, entry in enumerate(data):
            yield f"entry {index}", entry
    elif isinstance(data, dict):  # vLLM before 0.33
        for key, config in data.items():
            yield f"entry {key!r:.80}", {"key": key, "config": config}
    else:
        raise BuildError(f'{path} holds a JSON {type(data).__name__}; it takes a list of {{"key": {{...}}, "config": {{...}}}}')


def _entry(place: str, label: str, entry: Any, spec: OpSpec) -> ConfigEntry:
    if not isinstance(entry, dict) or not {"key", "config"} <= set(entry) or not isinstance(entry["config"], dict):
        raise BuildError(f'{place} is {entry!r:.80}; it takes {{"key": {{...}}, "config": {{...}}}}')
    if unknown := sorted(set(entry) - {"key", "config", "backend", "without"}):
        raise BuildError(f'{place} has {unknown[0]!r}; beside "key" and "config" it takes "backend" and "without"')
    for name, others in (("backend", {NO_ROW}), ("without", set[str]())):
        if (backend := entry.get(name)) is not None and (type(backend) is not str or backend not in {*PACKAGES, *others}):
            expected = sorted({*PACKAGES, *others})
            raise BuildError(f"{place} has {name} {backend!r:.80}; it takes the name of a backend, one of {expected}")
    if entry.get("backend") == NO_ROW and entry["config"]:
        raise BuildError(f"{place} has the backend {NO_ROW!r} and the config {entry['config']!r:.80}; it takes {{}}")
    sizes, arguments = _sizes(place, entry["key"], spec)
    _check_config(place, entry["config"])
    backend = entry.get("backend") or ("helion" if _HELION in entry["config"] else None)
    return ConfigEntry(sizes, entry["config"], backend, entry.get("without"), arguments, label, entry)


def _meant(key: Any) -> dict[str, Any]:
    """A key as an object of sizes by name; {} for vLLM's former name of it. A string that is none is returned as a name."""
    if not isinstance(key, str):
        return dict(key)
    if key == "default":
        return {}
    parts = [(match[1], match[2]) for match in _PART.finditer(key)]
    named = {name: int(value) for name, value in parts if len(value) < 20}
    spelled = "_".join(f"{name}_{value}" for name, value in parts)
    return named if spelled == key and len(named) == len(parts) else {key: None}


def _sizes(place: str, key: Any, spec: OpSpec) -> tuple[dict[str, int], dict[str, int]]:
    """The sizes that a key names, by symbol, and the arguments that are compiled in."""
    expected = sorted(spec.config_key)
    if not isinstance(key, (dict, str)):
        raise BuildError(f"{place} has the key {key!r:.80}; it takes an object with {expected}, or {{}} for the default")
    arguments = key_arguments(spec)
    meant = _meant(key)
    if spec.foreign_key is not None and all(_is_size(size) or name in arguments for name, size in meant.items()):
        meant = spec.foreign_key(meant)
    named = {name: meant.pop(name) for name in arguments if name in meant}
    known = dict(spec.config_key) | {symbol: symbol for symbol in KEY_SYMBOLS if symbol in spec.config_key.values()}
    if not set(meant) <= set(known):
        raise BuildError(
            f"{place} has the key {key!r:.200}; {spec.name} takes {expected}, fewer for sizes that are left open, "
            "or {} for the default"
        )
    for name, size in meant.items():
        if not _is_size(size):
            raise BuildError(f"{place} has {name} {size!r:.80}; it takes an integer of at least 1 and at most {LARGEST_SIZE}")
    for name, value in named.items():
        values = _values_of(spec, name)
        if type(value) is not int or value not in values:
            raise BuildError(f"{place} has {name} {value!r:.80}, which no variant of {spec.name} has; it takes one of {values}")
    sizes = {known[name]: size for name, size in meant.items()}
    if len(sizes) < len(meant):
        raise BuildError(f"{place} has the key {key!r:.200}, which names a size twice")
    return sizes, named


def _is_size(size: object) -> bool:
    return type(size) is int and 1 <= size <= LARGEST_SIZE


def _check_config(place: str, config: object) -> None:
    """Refuse NaN and infinities, and numbers too large for any kernel."""
    if isinstance(config, (dict, list)):
        for inner in config.values() if isinstance(config, dict) else config:
            _check_config(place, inner)
    elif isinstance(config, float) and not math.isfinite(config):
        raise BuildError(f"{place} has {config} in its config; numbers are finite")
    elif isinstance(config, int) and not -(2**63) <= config < 2**63:
        raise BuildError(f"{place} has an integer of {config.bit_length()} bits in its config; they fit 64")


def find(spec: OpSpec, target: GpuTarget, *folders: Path) -> tuple[ConfigFile, str | None] | None:
    """The op's file for a GPU in the first folder with one, and a note if it is another GPU's; None if there is neither."""
    if (path := find_file(folders, target.config_file)) is None:
        return None
    note = f"{spec.name}: no configs for {target.name}, using {path}" if path.name != target.config_file else None
    return read(path, spec), note


def find_file(folders: Sequence[Path], name: str) -> Path | None:
    """The first of folders' files of a card, by the file's name; else of `FALLBACK`; None if none has either."""
    paths = [folder / each for each in (name, FALLBACK) for folder in folders]
    return next((path for path in paths if path.is_file()), None)


def installed(op: str) -> Path:
    """The folder of an op's configs that comes with hdispatch."""
    package = importlib.util.find_spec("hdispatch.configs")
    roots = list(package.submodule_search_locations or ()) if package else []
    if not roots:
        raise BuildError("hdispatch is installed without its configs; reinstall it")
    return Path(roots[0]) / op
