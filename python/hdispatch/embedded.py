"""The bundle that serves when none is named: $HDISPATCH_BUNDLE, else the package's own for the GPU that is here."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from .archive import SUFFIX, locate
from .errors import BundleError

#: Names the bundle of a process.
VARIABLE = "HDISPATCH_BUNDLE"
#: Where a wheel has its bundles, an archive for each architecture: `file_name`.
FOLDER = Path(__file__).parent / "bundles"
#: How to make a bundle where there is none.
ADVICE = f"build one with `hdispatch build --target native --out bundle` and name it, or set {VARIABLE}=bundle"


class Choice(NamedTuple):
    """A bundle, and why this one."""

    bundle: Path
    why: str


def file_name(arch: str, cards: Sequence[str] = ()) -> str:
    """The name of an embedded archive: sm_90a.tar.xz, of one bundle; sm_90a-h200-h100.tar.xz, of one for each of these cards.

    Cards are called as targets are. The first one's bundle serves all other cards of the architecture.
    """
    return "-".join([arch, *cards]) + SUFFIX


def choose(device: int) -> Path:
    """The bundle for a CUDA device, or for the null driver (-1): see `decide`."""
    return decide(device).bundle


def decide(device: int) -> Choice:
    """The bundle for a CUDA device, or for the null driver (-1), which takes the first that the package has; and why.

    `BundleError` if there is none, or if $HDISPATCH_BUNDLE names nothing that is there.
    """
    given = from_environment()
    if given is not None:
        return Choice(given, f"{VARIABLE} names it")
    own = available()
    if device < 0:
        if own:
            return _of_card(next(iter(own.values())), "")
        raise BundleError(f"{VARIABLE} is not set, and this hdispatch was installed without a bundle; {ADVICE}")
    here = torch.cuda.get_device_properties(device)
    for suffix in ("a", ""):
        if (found := own.get(f"sm_{here.major}{here.minor}{suffix}")) is not None:
            return _of_card(found, here.name)
    raise BundleError(
        f"{VARIABLE} is not set, and this hdispatch has no bundle for cuda:{device}, "
        f"{here.name} (sm_{here.major}{here.minor}): it was installed with {', '.join(own) or 'none'}; {ADVICE}"
    )


def _of_card(archive: Path, name: str) -> Choice:
    """The bundle of an embedded archive for a GPU that CUDA calls so, by the names of cards; "": no GPU."""
    cards = archive.name.removesuffix(SUFFIX).split("-")[1:]
    if not cards:
        return Choice(archive, "the only one for its architecture")
    called = re.sub(r"[^a-z0-9]+", "_", name.lower())
    for card in cards:
        if f"_{card}_" in f"_{called}_":
            return Choice(archive / card, f"the one for {name}")
    why = f"none is for {name}" if name else "there is no GPU"
    return Choice(archive / cards[0], f"the first of {', '.join(cards)}: {why}")


def from_environment() -> Path | None:
    """The bundle that $HDISPATCH_BUNDLE names; None if it is not set. `BundleError` if there is nothing of that name."""
    given = os.environ.get(VARIABLE, "")
    archive = locate(Path(given))
    if given and not (archive[0] if archive else Path(given)).exists():
        raise BundleError(f"{VARIABLE} is {given!r}, which does not exist; make it with `hdispatch build --out {given}`")
    return Path(given) if given else None


def available() -> dict[str, Path]:
    """Architecture -> the package's own archive for it."""
    return {path.name.removesuffix(SUFFIX).partition("-")[0]: path for path in sorted(FOLDER.glob(f"*{SUFFIX}"))}


def check_any() -> None:
    """Raise `BundleError` if no device can have a bundle; touches no GPU, as a process that has not chosen one yet must not."""
    if from_environment() is None and not available():
        choose(-1)
