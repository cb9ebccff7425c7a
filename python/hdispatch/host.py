"""This machine's CPU, as a bundle's host functions see it: they are compiled for that of the machine that built them."""

from __future__ import annotations

import platform
import re
from pathlib import Path

from .errors import BundleError
from .manifest import Host

#: The levels of x86-64 (v2, v3, v4), by their names in /proc/cpuinfo. Newer extensions only add vector arithmetic, which
#: functions that check arguments and fill structures do not use: a bundle is not refused for lack of them.
_FEATURES = {
    *("pni", "ssse3", "sse4_1", "sse4_2", "popcnt"),
    *("abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"),
    *("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"),
}


def describe(cpuinfo: Path = Path("/proc/cpuinfo")) -> Host:
    """The CPU here: what a bundle that is built here records."""
    text = cpuinfo.read_text(encoding="utf-8", errors="replace") if cpuinfo.exists() else ""
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    flags = found[1].split() if found else []
    return {"machine": platform.machine(), "features": sorted(_FEATURES.intersection(flags))}


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
