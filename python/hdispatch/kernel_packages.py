"""Ops outside of hdispatch: the packages that installed distributions name, and folders and packages that a user names.

An op is a package with a `spec.py`, whatever it is called and wherever it lies; a package of ops holds such packages. Nothing
here imports a spec.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from .errors import HdispatchError

#: Entry points whose values are packages of ops, or ops: `my_kernels = "my_kernels.ops"`.
GROUP = "hdispatch.kernels"

SPEC = "spec.py"


def installed() -> list[str]:
    """The dotted name of every op that an installed distribution names in the group. `HdispatchError` if one is not there."""
    found: dict[str, None] = {}
    for entry in sorted(entry_points(group=GROUP), key=lambda each: (each.name, each.value)):
        found |= dict.fromkeys(_named_by(entry))
    return list(found)


def _named_by(entry: EntryPoint) -> list[str]:
    owner = entry.dist.name if entry.dist is not None else "an installed distribution"
    try:
        return _ops_in(entry.value)
    except HdispatchError as error:
        raise HdispatchError(
            f"{owner} names {entry.value!r} in the entry points {GROUP!r} ({entry.name}): {error}; repair or uninstall it"
        ) from error


def op_packages(where: str | Path) -> list[str]:
    """The dotted names of the ops in a folder or a dotted package: that of the op that it is, or those that it holds.

    A folder that is part of a package is imported as that; what it takes to import it is appended to `sys.path`.
    `HdispatchError` if there is no such thing, it holds no op, or its name means another package here.
    """
    text = os.fspath(where)
    if Path(text).is_dir():
        return _ops_in_folder(Path(text).resolve())
    if isinstance(where, Path) or os.sep in text or not all(part.isidentifier() for part in text.split(".")):
        raise HdispatchError(f"{text} is no folder; kernels are a folder or a dotted package that can be imported")
    return _ops_in(text)


def _ops_in(package: str) -> list[str]:
    folders = folders_of(package)
    if any((folder / SPEC).is_file() for folder in folders):
        return [package]
    names = sorted({child.name for folder in folders for child in _children(folder)})
    if not names:
        raise HdispatchError(f"{package} in {', '.join(map(str, folders))} has no {SPEC} and no folder with one")
    return [f"{package}.{name}" for name in names]


def _ops_in_folder(folder: Path) -> list[str]:
    is_op = (folder / SPEC).is_file()
    ops = [folder] if is_op else _children(folder)
    if not ops:
        raise HdispatchError(f"{folder} has no {SPEC} and no folder with one")
    root = folder.parent if is_op else folder
    while (root / "__init__.py").is_file():
        root = root.parent
    if str(root) not in sys.path:
        sys.path.append(str(root))
    importlib.invalidate_caches()
    return [_checked(op, root) for op in ops]


def _checked(op: Path, root: Path) -> str:
    """The dotted name of an op's folder, which is what is imported by it."""
    parts = op.relative_to(root).parts
    if wrong := [part for part in parts if not part.isidentifier()]:
        raise HdispatchError(f"{op}: {wrong[0]!r} is no name of a package; rename the folder")
    package = ".".join(parts)
    found = [folder.resolve() for folder in folders_of(package)]
    if op not in found:
        raise HdispatchError(f"{op}: {package} is another package here, {found[0]}; rename the folder {root / parts[0]}")
    return package


def _children(folder: Path) -> list[Path]:
    return sorted(child for child in folder.iterdir() if (child / SPEC).is_file())


def folders_of(package: str) -> list[Path]:
    """Where a package's files are; its parents are imported. `HdispatchError` if it cannot be imported as a package."""
    try:
        found = importlib.util.find_spec(package)
    except ImportError as error:
        raise HdispatchError(f"{package} cannot be imported here: {error}") from error
    locations = list(found.submodule_search_locations or ()) if found else []
    if not locations:
        raise HdispatchError(f"{package} is not a package that can be imported here")
    return [Path(location) for location in locations]
