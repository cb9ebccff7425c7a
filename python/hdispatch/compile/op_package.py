"""Packages of ops: which there are, where their files are, what they say without being imported. No DSL."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import pkgutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .. import kernel_packages
from ..errors import BuildError
from ..opspec import CALL_SYMBOLS, OpSpec
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


@dataclass(frozen=True, eq=False)
class OpPackage:
    """The folder of an op, as builds and tuning see it; two are equal if they are the same one.

    package    its dotted name, by which worker processes import it
    backends   those that the op has kernels for, its default first
    generic    by backend, the sizes that are not compiled into its kernels
    configs    the folder of its config files
    launched   by backend, the options of configs that are not compiled in: the launch alone takes them
    """

    name: str
    package: str
    spec: OpSpec
    folder: Path
    backends: tuple[str, ...]
    generic: Mapping[str, frozenset[str]]
    configs: Path
    launched: Mapping[str, frozenset[str]] = field(default_factory=dict)

    def config_files(self) -> list[Path]:
        """The op's config files, of every card."""
        return sorted(path for path in self.configs.glob("*.json") if not path.name.endswith(".tuned.json"))


def find(ops: Sequence[str] | None, extra: Sequence[str] = ()) -> dict[str, OpPackage]:
    """Ops by name, in a fixed order. None: all of hdispatch, of installed distributions (`kernel_packages`) and of extra.

    extra   folders and dotted packages outside of hdispatch, ops or packages of ops

    BuildError for an unknown name, for no name at all, for two ops of one name and for a package that does not hold the op of
    its name.
    """
    known = {name: f"{KERNELS}.{name}" for name in available_ops()}
    if extra or ops is None or not known.keys() >= set(ops):
        for package in dict.fromkeys([*kernel_packages.installed(), *in_packages(extra)]):
            name = load_spec(package).name
            if known.setdefault(name, package) != package:
                raise BuildError(f"{package} and {known[name]} both declare the op {name!r}; rename one")
    names = sorted(known) if ops is None else list(dict.fromkeys(ops))
    if unknown := [name for name in names if name not in known]:
        raise BuildError(f"no op {unknown[0]!r}; there are {sorted(known)}")
    if not names:
        raise BuildError("no ops to build")
    return {name: read(name, known[name]) for name in names}


def in_packages(where: Sequence[str]) -> list[str]:
    """The dotted names of the ops in folders and packages, each once."""
    return list(dict.fromkeys(package for each in where for package in kernel_packages.op_packages(each)))


def read(name: str, package: str) -> OpPackage:
    """The op of a dotted package. BuildError if that is of another name, or has no kernel."""
    spec, folder = load_spec(package), folder_of(package)
    if spec.name != name:
        raise BuildError(f"{package}.spec declares the op {spec.name!r}; its package is named {name!r}")
    backends = tuple(backend for backend in PACKAGES if (folder / f"{backend}.py").is_file())
    if not backends:
        raise BuildError(f"{package}: {folder} has none of {[f'{backend}.py' for backend in PACKAGES]}")
    modules = {backend: folder / f"{backend}.py" for backend in backends}
    generic = {backend: _named(module, "GENERIC") | frozenset(CALL_SYMBOLS) for backend, module in modules.items()}
    launched = {backend: _named(module, "LAUNCHED") for backend, module in modules.items()}
    return OpPackage(name, package, spec, folder, backends, generic, config_folder(package), launched)


def folder_of(package: str) -> Path:
    """Where a package's files are. HdispatchError if it cannot be imported here."""
    return kernel_packages.folders_of(package)[0]


def config_folder(package: str) -> Path:
    """Where an op's config files are."""
    if package.startswith(f"{KERNELS}."):
        return configs.installed(package.rpartition(".")[2])
    return folder_of(package) / "configs"


def _named(module: Path, constant: str) -> frozenset[str]:
    """What a kernel's module says is not compiled in. Read without importing a DSL.

    GENERIC are sizes, `("K",)`, LAUNCHED options of configs, `("chunk",)`.
    """
    for node in ast.parse(module.read_text()).body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == [constant]:
            return frozenset(ast.literal_eval(node.value))
    return frozenset()


def sources(packages: Iterable[str], *, build_wing: bool = True) -> dict[str, dict[str, str]]:
    """For each package, the hash of every module that decides its records, and the versions of the distributions it uses.

    The modules are the package's own, the build wing's, and all that these import. Files are read as they are now.
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
