"""The bundle that serves when none is named: $HDISPATCH_BUNDLE, else the package's own for the GPU that is here."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from .archive import SUFFIX
from .errors import BundleError

#: Names the bundle of a process.
VARIABLE = "HDISPATCH_BUNDLE"
#: Where a wheel has its bundles, named by the architecture they are for: sm_90a.tar.xz.
FOLDER = Path(__file__).parent / "bundles"
#: How to make a bundle where there is none.
ADVICE = f"build one with `hdispatch build --target native --out bundle` and name it, or set {VARIABLE}=bundle"


def choose(device: int) -> Path:
    """The bundle for a CUDA device, or for the null driver (-1), which takes whatever the package has.

    `BundleError` if there is none, or if $HDISPATCH_BUNDLE names nothing that is there.
    """
    given = from_environment()
    if given is not None:
        return given
    own = available()
    if device < 0:
        if own:
            return next(iter(own.values()))
        raise BundleError(f"{VARIABLE} is not set, and this hdispatch was installed without a bundle; {ADVICE}")
    here = torch.cuda.get_device_properties(device)
    for suffix in ("a", ""):
        if (found := own.get(f"sm_{here.major}{here.minor}{suffix}")) is not None:
            return found
    raise BundleError(
        f"{VARIABLE} is not set, and this hdispatch has no bundle for cuda:{device}, "
        f"{here.name} (sm_{here.major}{here.minor}): it was installed with {', '.join(own) or 'none'}; {ADVICE}"
    )


def from_environment() -> Path | None:
    """The bundle that $HDISPATCH_BUNDLE names; None if it is not set. `BundleError` if there is nothing of that name."""
    given = os.environ.get(VARIABLE, "")
    if given and not Path(given).exists():
        raise BundleError(f"{VARIABLE} is {given!r}, which does not exist; make it with `hdispatch build --out {given}`")
    return Path(given) if given else None


def available() -> dict[str, Path]:
    """Architecture -> the package's own bundle for it."""
    return {path.name.removesuffix(SUFFIX): path for path in sorted(FOLDER.glob(f"*{SUFFIX}"))}


def check_any() -> None:
    """Raise `BundleError` if no device can have a bundle; touches no GPU, as a process that has not chosen one yet must not."""
    if from_environment() is None and not available():
        choose(-1)
