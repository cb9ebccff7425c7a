"""This machine's CPU, as a bundle's host functions see it: they are compiled for that of the machine that built them."""

from __future__ import annotations

import platform
import re
from pathlib import Path

from .errors import BundleError
from .manifest import Host

#: What compilers emit unasked on a CPU that has it, by its name in /proc/cpuinfo. Others, cryptography say, are left out:
#: a bundle must not be refused for what its code does not use.
_FEATURES = re.compile(r"sse[23]|sse4_[12]|ssse3|pni|popcnt|avx\w*|f16c|fma|bmi[12]|abm|movbe|adx|gfni|asimd\w*|sve\w*|atomics|fphp")


def describe(cpuinfo: Path = Path("/proc/cpuinfo")) -> Host:
    """The CPU here: what a bundle that is built here records."""
    text = cpuinfo.read_text(encoding="utf-8", errors="replace") if cpuinfo.exists() else ""
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    flags = found[1].split() if found else []
    return {"machine": platform.machine(), "features": sorted({flag for flag in flags if _FEATURES.fullmatch(flag)})}


def check(where: str, needed: Host, here: Host | None = None) -> None:
    """Raise `BundleError` unless code for `needed` runs here."""
    here = here or describe()
    if needed["machine"] != here["machine"]:
        raise BundleError(f"{where}: its host functions are for {needed['machine']}; this machine is {here['machine']}")
    missing = sorted(set(needed["features"]) - set(here["features"]))
    if missing:
        raise BundleError(
            f"{where}: its host functions were compiled on a CPU with {', '.join(missing)}, which the CPU here lacks; "
            "build the bundle on a machine like this one"
        )
