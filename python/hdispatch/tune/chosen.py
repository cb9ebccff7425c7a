"""What an op's config files ever chose, of any card, size and variant: by default no more of its kernels' lists is measured.

A backend that was never chosen is left out. Of a kernel that says which options its launch alone takes (`LAUNCHED`), those
configs stay whose code was chosen, at sizes that a file has: their other options are as a choice has them. Configs of other
kernels stay all: what is best at other sizes has other options, as docs/tuning.md shows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..compile import configs
from ..compile.op_package import OpPackage
from ..opspec import Variant
from .timings import ConfigKey, canonical


class Chosen:
    """The choices of an op's config files."""

    def __init__(self, package: OpPackage) -> None:
        self.package = package
        self.entries = [
            entry
            for path in package.config_files()
            for entry in configs.read(path, package.spec).entries
            if entry.backend != configs.NO_ROW
        ]

    def backends(self, there: Sequence[str]) -> list[str]:
        """Those that were chosen, of those that are there; all of these where none of them was."""
        chosen = {self.backend_of(entry) for entry in self.entries}
        return [name for name in there if name in chosen] or list(there)

    def of(self, backend: str, row: Mapping[str, int], variant: Variant, listed: Sequence[ConfigKey]) -> list[ConfigKey]:
        """The configs of a kernel's list at some sizes that are measured; all where the files do not have the sizes."""
        launched = self.package.launched.get(backend, frozenset())
        if not launched:
            return list(listed)
        codes = {
            _code(entry.config, launched)
            for entry in self.entries
            if self.backend_of(entry) == backend
            and entry.shape == row
            and all(configs.argument_of(variant, name) == value for name, value in entry.arguments.items())
        }
        return [each for each in listed if _code(json.loads(each.config), launched) in codes] or list(listed)

    def backend_of(self, entry: configs.ConfigEntry) -> str:
        """The backend that an entry is for."""
        return entry.backend or self.package.backends[0]


def _code(config: Mapping[str, Any], launched: frozenset[str]) -> str:
    """The options that are compiled in."""
    return canonical({name: value for name, value in config.items() if name not in launched})
