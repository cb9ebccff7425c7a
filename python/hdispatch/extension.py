"""Whether the compiled extension fits the torch that is installed: asked when hdispatch is imported."""

from __future__ import annotations

import importlib
import itertools
import sys
from pathlib import Path
from typing import NoReturn

import torch

from ._build_info import TORCH_VERSION

_REBUILD = "Rebuild it: pip install --no-build-isolation --force-reinstall --no-deps hdispatch (or . in a checkout)"


def problem() -> str:
    """Why the extension cannot be used; empty if it can, and then it is imported."""
    if torch.__version__.split("+")[0] != TORCH_VERSION.split("+")[0]:
        return (
            f"hdispatch's extension was compiled against torch {TORCH_VERSION}, but torch {torch.__version__} is installed. "
            f"{_REBUILD}"
        )
    try:
        importlib.import_module(f"{__package__}._C")
    except ImportError as error:
        return f"hdispatch's extension cannot be imported: {error}. {_REBUILD}"
    return ""


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
