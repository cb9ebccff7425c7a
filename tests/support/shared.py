"""What a run of pytest makes once for all of pytest-xdist's workers: whichever asks first makes it, others wait for it."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def folder(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """The run's folder of this name, which `make` fills once; where it fails or dies, the next who asks begins anew."""
    base = factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    root.mkdir(exist_ok=True)
    made, complete = root / name, root / f"{name}.complete"
    with (root / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of a process that dies the kernel takes it back
        if not complete.exists():
            shutil.rmtree(made, ignore_errors=True)
            made.mkdir()
            make(made)
            complete.touch()
    return made


def value(factory: pytest.TempPathFactory, name: str, make: Callable[[], Any]) -> Any:
    """The run's value of this name, as JSON keeps it."""
    return json.loads(
        (folder(factory, name, lambda made: (made / "value").write_text(json.dumps(make()))) / "value").read_text()
    )
