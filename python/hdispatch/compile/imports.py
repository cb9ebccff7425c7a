"""The static import graph: which source files a module runs, followed through the text, without importing any of them."""

from __future__ import annotations

import ast
import functools
import sys
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import packages_distributions, version
from pathlib import Path

from ..errors import BuildError

#: Folders of installed distributions: their versions stand for their texts.
_INSTALLED = {"site-packages", "dist-packages"}


@dataclass(frozen=True)
class Closure:
    """Modules that run: name -> source file, and the installed distributions that they take, each as `name==version`."""

    files: dict[str, Path]
    distributions: frozenset[str]


@dataclass(frozen=True)
class _Found:
    """A module that is there: its source file, if it has one, and a package's folders."""

    source: Path | None
    folders: tuple[str, ...] = ()


class ImportGraph:
    """The source files as they are now; what was found once is not looked for again."""

    def __init__(self) -> None:
        self._found: dict[str, _Found | None] = {}
        self._named: dict[tuple[str, frozenset[str]], list[str]] = {}

    def closure(self, modules: Iterable[str]) -> Closure:
        """All that `modules` run.

        Follows every `import`, in functions and under conditions too, whatever folder it reaches; ends at the standard
        library and at distributions other than hdispatch and those of `modules`. A package that is merely passed on the way
        to a module is listed without what it imports. BuildError for a file that is no Python.
        """
        waiting = list(modules)
        own = frozenset({"hdispatch", *(_top(name) for name in waiting)})
        files: dict[str, Path] = {}
        distributions: set[str] = set()
        followed: set[str] = set()
        while waiting:
            name = waiting.pop()
            if name in followed:
                continue
            followed.add(name)
            if not self._is_followed(name, own):
                distributions.update(() if _top(name) in sys.stdlib_module_names else self._distributions(_top(name)))
                continue
            for module in (*_parents(name), name):
                if (found := self._find(module)) is not None and found.source is not None:
                    files[module] = found.source
            if name in files:
                waiting += self._imports(name, files[name], own)
        return Closure(files, frozenset(distributions))

    def _imports(self, name: str, path: Path, own: frozenset[str]) -> list[str]:
        """The modules that a source file names in its imports."""
        if (name, own) not in self._named:
            package = name if path.name == "__init__.py" else name.rpartition(".")[0]
            self._named[name, own] = list(self._named_in(_parse(path), package, own))
        return self._named[name, own]

    def _named_in(self, tree: ast.Module, package: str, own: Collection[str]) -> Iterator[str]:
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and (base := _base(node, package)):
                yield from self._taken_from(base, node.names, own)

    def _taken_from(self, base: str, names: Iterable[ast.alias], own: Collection[str]) -> Iterator[str]:
        """`from base import x`: the module base.x if there is one; else base itself is what has x."""
        followed = self._is_followed(base, own)
        for alias in names:
            inner = f"{base}.{alias.name}"
            yield inner if followed and alias.name != "*" and self._find(inner) is not None else base

    def _is_followed(self, name: str, own: Collection[str]) -> bool:
        top = _top(name)
        return top in own or (top not in sys.stdlib_module_names and not self._distributions(top))

    def _distributions(self, top: str) -> frozenset[str]:
        """The distributions that have a top-level module; none if it is not installed as one."""
        found = self._find(top)
        where = [*map(Path, found.folders), *([found.source] if found.source else [])] if found else []
        if not any(_INSTALLED & set(path.parts) for path in where):
            return frozenset()
        return frozenset(f"{name}=={version(name)}" for name in _owners().get(top, ())) or frozenset({f"{top}==?"})

    def _find(self, name: str) -> _Found | None:
        if name not in self._found:
            self._found[name] = self._look_for(name)
        return self._found[name]

    def _look_for(self, name: str) -> _Found | None:
        """As `importlib.util.find_spec`, which would import the packages on the way."""
        parent, _, last = name.rpartition(".")
        folders: list[str] | None = None
        if parent:
            above = self._find(parent)
            if above is None or not above.folders:
                return None
            folders = list(above.folders)
        for finder in sys.meta_path:
            try:
                spec = finder.find_spec(name, folders)
            except (KeyError, AttributeError):  # a folder without __init__.py, in what is not imported, or not as a package
                return _Found(None, tuple(str(Path(each) / last) for each in folders or () if (Path(each) / last).is_dir()))
            if spec is not None:
                is_source = spec.has_location and str(spec.origin).endswith(".py")
                return _Found(Path(str(spec.origin)) if is_source else None, tuple(spec.submodule_search_locations or ()))
        return None


def _top(name: str) -> str:
    return name.partition(".")[0]


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]


def _base(node: ast.ImportFrom, package: str) -> str:
    """The absolute name of what a `from … import` takes from; "" for one above the top, which Python refuses."""
    if not node.level:
        return node.module or ""
    parts = package.split(".")
    above = parts[: len(parts) - (node.level - 1)]
    return ".".join([*above, *([node.module] if node.module else [])])


def _parse(path: Path) -> ast.Module:
    try:
        return ast.parse(path.read_bytes(), filename=str(path))
    except (OSError, SyntaxError, ValueError) as error:
        raise BuildError(f"{path}, which is built from, cannot be read as Python: {error}") from error


@functools.cache
def _owners() -> dict[str, list[str]]:
    return dict(packages_distributions())
