"""Packages of ops: which there are, where their files are, what they say without being imported. No DSL."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import pkgutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..errors import BuildError
from . import configs
from .build_unit import load_spec
from .imports import Closure, ImportGraph
from .versions import PACKAGES

KERNELS = "hdispatch.kernels"


def available_ops() -> list[str]:
    """Names of the ops that come with hdispatch: the packages that declare one."""
    package = importlib.util.find_spec(KERNELS)
    folders = [Path(folder) for folder in package.submodule_search_locations or ()] if package else []
    names = [module.name for module in pkgutil.iter_modules(map(str, folders)) if module.ispkg]
    return sorted(name for name in names if any((folder / name / "spec.py").is_file() for folder in folders))


def find(ops: Sequence[str] | None, extra: Sequence[str] = ()) -> dict[str, str]:
    """Op name -> dotted package, in a fixed order. None: all ops; extra: packages outside of hdispatch. BuildError."""
    known = {name: f"{KERNELS}.{name}" for name in available_ops()} | {load_spec(package).name: package for package in extra}
    names = sorted(known) if ops is None else list(dict.fromkeys(ops))
    if unknown := [name for name in names if name not in known]:
        raise BuildError(f"no op {unknown[0]!r}; there are {sorted(known)}")
    if not names:
        raise BuildError("no ops to build")
    for name in names:
        if (found := load_spec(known[name]).name) != name:
            raise BuildError(f"{known[name]}.spec declares the op {found!r}; its package is named {name!r}")
    return {name: known[name] for name in names}


def folder_of(package: str) -> Path:
    """Where a package's files are. BuildError if it cannot be imported here."""
    found = importlib.util.find_spec(package)
    locations = list(found.submodule_search_locations or ()) if found else []
    if not locations:
        raise BuildError(f"{package} is not a package that can be imported here")
    return Path(locations[0])


def backends_of(package: str) -> list[str]:
    """The backends that an op has kernels for, its default first. BuildError if there is none."""
    folder = folder_of(package)
    backends = [name for name in PACKAGES if (folder / f"{name}.py").is_file()]
    if not backends:
        raise BuildError(f"{package}: {folder} has none of {[f'{name}.py' for name in PACKAGES]}")
    return backends


def config_folder(package: str) -> Path:
    """Where an op's config files are."""
    if package.startswith(f"{KERNELS}."):
        return configs.installed(package.rpartition(".")[2])
    return folder_of(package) / "configs"


def generic_sizes(package: str, backend: str) -> frozenset[str]:
    """The sizes that a kernel's module says are not compiled in: `GENERIC = ("K",)`. Read without importing a DSL."""
    for node in ast.parse((folder_of(package) / f"{backend}.py").read_text()).body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["GENERIC"]:
            return frozenset(ast.literal_eval(node.value))
    return frozenset()


def sources(packages: Iterable[str], *, build_wing: bool = True) -> dict[str, dict[str, str]]:
    """Of each package: hashes of all that decides its records, by module: what its modules run, wherever that is, and the
    build wing with what that runs; and the versions of the distributions that they take. Read from the files as they are now.
    """
    graph, hashes = ImportGraph(), _Hashes()
    wing = [f"{__package__}.{path.stem}" for path in sorted(Path(__file__).parent.glob("*.py"))] if build_wing else []
    return {package: hashes.of(graph.closure([*modules_of(package), *wing])) for package in packages}


def modules_of(package: str) -> list[str]:
    """Every module in an op's folder."""
    return [f"{package}.{path.stem}" for path in sorted(folder_of(package).glob("*.py"))]


class _Hashes:
    """SHA-256 of files, each read once."""

    def __init__(self) -> None:
        self._of: dict[Path, str] = {}

    def of(self, found: Closure) -> dict[str, str]:
        """By module; and of each distribution its version."""
        for path in found.files.values():
            if path not in self._of:
                self._of[path] = hashlib.sha256(path.read_bytes()).hexdigest()
        files = {name: self._of[path] for name, path in sorted(found.files.items())}
        return files | {name: versions for name, _, versions in (each.partition("==") for each in sorted(found.distributions))}
