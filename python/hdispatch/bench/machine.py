"""Environment that is recorded with every result: machine, versions, revision, date."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

#: Names that the revision instead of git, e.g. where the checkout was copied without its history.
REVISION_VARIABLE = "HDISPATCH_REVISION"


def describe(device: torch.device | None = None) -> dict[str, Any]:
    """The machine header of a result: GPU, driver, CPU, versions, revision, date. `device` is a CUDA device or None."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "gpu": torch.cuda.get_device_name(device) if device is not None else None,
        "driver": driver_version(),
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        **versions(),
        "revision": revision(),
    }


def measured_with() -> dict[str, Any]:
    """What goes into every timing of tuning: the driver, the versions, the revision."""
    machine = describe()
    return {name: machine[name] for name in ("driver", "python", "torch", "cuda", "hdispatch", "revision")}


def versions() -> dict[str, str | None]:
    """Versions of what takes part; None for what is not installed."""
    return {
        "hdispatch": package_version("hdispatch"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": package_version("triton"),
        "helion": package_version("helion"),
    }


def package_version(name: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_model() -> str:
    """The CPU's name as Linux gives it."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.machine()


def driver_version() -> str | None:
    """The version of the NVIDIA kernel driver, or None without one."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]) or ""
    found = re.search(r"\d+\.\d+(\.\d+)?", text)
    return found[0] if found else None


def revision() -> str | None:
    """$HDISPATCH_REVISION, else the git revision of the checkout that this runs from, `+changes` if it has any; or None."""
    if given := os.environ.get(REVISION_VARIABLE):
        return given
    checkout = Path(__file__).resolve().parents[3]
    if not (checkout / "pyproject.toml").is_file():
        return None
    git = ["git", "-C", str(checkout)]
    head = _output([*git, "rev-parse", "HEAD"])
    if not head:
        return None
    return head + ("+changes" if _output([*git, "status", "--porcelain", "--untracked-files=no"]) else "")


def _output(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
