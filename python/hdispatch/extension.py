"""The compiled extension for the torch that is installed: chosen and imported when hdispatch is imported.

A package holds one `_C` for each minor version of torch that it serves, in `torch_X_Y/`. Importing it under another one
would crash, not fail; so torch's version is compared with `_build_info` before.
"""

from __future__ import annotations

import importlib.util
import itertools
import re
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import NoReturn

import torch

from . import _build_info

_REBUILD = "pip install --no-build-isolation --force-reinstall --no-deps hdispatch (or . in a checkout)"


def problem() -> str:
    """Why no extension can be used; empty if one can, and then `hdispatch._C` is imported."""
    built = _built_for(torch.__version__)
    if built is None:
        versions = ", ".join(version.split("+")[0] for version in _build_info.TORCH_VERSIONS.values())
        return (
            f"hdispatch's extension was compiled against torch {versions}, but torch {torch.__version__} is installed. "
            f"Install a torch of {' or '.join(_build_info.TORCH_VERSIONS)}, or rebuild hdispatch: {_REBUILD}"
        )
    try:
        _import_for(built)
    except ImportError as error:
        return f"hdispatch's extension cannot be imported: {error}. Rebuild it: {_REBUILD}"
    return ""


def _built_for(version: str) -> str | None:
    """The minor version whose extension serves that torch, or None. Releases of one minor version share their ABI."""
    release = version.split("+")[0]
    minor = ".".join(release.split(".")[:2])
    built = _build_info.TORCH_VERSIONS.get(minor, "").split("+")[0]
    both_final = all(re.fullmatch(r"\d+(\.\d+)+", each) for each in (release, built))
    return minor if built and (both_final or release == built) else None


def _import_for(minor: str) -> None:
    """Import `hdispatch._C` from the folder of that minor version."""
    name = f"{__package__}._C"
    if name in sys.modules and sys.modules[name] is None:  # what import says of a module that is ruled out
        raise ImportError(f"import of {name} halted; None in sys.modules")
    assert _build_info.__file__ is not None
    folder = Path(_build_info.__file__).parent / f"torch_{minor.replace('.', '_')}"
    files = [folder / f"_C{suffix}" for suffix in EXTENSION_SUFFIXES]
    file = next((each for each in files if each.is_file()), None)
    if file is None:
        raise ImportError(f"there is no {files[0]}")
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    sys.modules[__package__]._C = module  # type: ignore[attr-defined]


def refuse(why: str) -> NoReturn:
    """ImportError with the problem. Where the command line is what imports hdispatch, it says so in its own words and ends."""
    if not _is_command():
        raise ImportError(why)
    from .cli import doctor

    sys.exit(doctor.run_without_extension(sys.argv[1:], why))


def _is_command() -> bool:
    """Whether this process is `hdispatch …` or `python -m hdispatch …`."""
    options = sys.orig_argv[1:]
    is_module = any(pair == ("-m", "hdispatch") for pair in itertools.pairwise(options))
    return Path(sys.argv[0]).name == "hdispatch" or (is_module and sys.argv[0] == "-m")
