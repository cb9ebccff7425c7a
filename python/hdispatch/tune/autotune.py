"""Helion's own autotuner as a source of candidates: slow, on the GPU that is here, and with Helion's own measurements.

Its winners are written to `<out>/<op>/nvidia_<gpu>.json` in vLLM's format, one by one, so that a run can be broken off and
resumed; `hdispatch tune candidates --configs <out>` then measures them beside all others.

Imports helion late: it needs a GPU.
"""

from __future__ import annotations

import copy
import importlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..compile import configs, op_package
from ..compile.store import write_atomic
from ..compile.target import present
from ..errors import BuildError
from ..opspec import OpSpec
from .points import Point, Scope, points_of, sizes_of

#: Kinds of indexing that a launch record can hold: descriptors made on the device need scratch memory.
OVERRIDES = {"indexing": "pointer"}


def autotune(
    ops: Sequence[str] | None,
    out: Path,
    *,
    scope: Scope,
    effort: str = "quick",
    seconds: float | None = None,
    extra: Sequence[str] = (),
    progress: Callable[[int, int, str], None] | None = None,
) -> list[str]:
    """Tunes the Helion kernels of ops at every point of the scope that the files in `out` do not have.

    effort    Helion's: "quick" or "full"
    seconds   after which no further point is begun

    Returns a line of text per failure. BuildError without a GPU, or if none of the ops has a Helion kernel.
    """
    start = time.monotonic()
    gpu = present()
    packages = {name: package for name, package in op_package.find(ops, extra).items() if "helion" in package.backends}
    if not packages:
        raise BuildError("none of the ops has a Helion kernel")
    points = [point for package in packages.values() for point in points_of(package, scope)]
    failed = []
    for done, point in enumerate(points):
        if seconds is not None and time.monotonic() - start >= seconds:
            break
        spec, sizes = point.op.spec, sizes_of(point)
        path = out / spec.name / gpu.config_file
        given = {**dict(point.row), **spec.ladders.edges(point.bucket)}
        key = {named: given[symbol] for named, symbol in spec.config_key.items() if symbol in given}
        entries = [entry.raw for entry in configs.read(path, spec).entries] if path.is_file() else []
        if any(entry["key"] == key for entry in entries):
            continue
        if progress:
            progress(done, len(points), f"{spec.name} {key}")
        try:
            config = _best(point, spec, sizes, effort)
        except Exception as error:  # Helion may raise anything; the other points do not depend on it
            failed.append(f"{spec.name} {key}: {type(error).__name__}: {error}")
            continue
        lines = ",\n".join(json.dumps(entry) for entry in [*entries, {"key": key, "config": config}])
        write_atomic(path, f"[\n{lines}\n]\n".encode())
    return failed


def _best(point: Point, spec: OpSpec, sizes: dict[str, int], effort: str) -> dict[str, Any]:
    """The config that Helion's search finds for a point."""
    helion = importlib.import_module("helion")
    kernel = importlib.import_module(f"{point.op.package}.helion").KERNEL
    settings = copy.copy(kernel.settings)
    settings.autotune_effort = effort
    settings.autotune_config_overrides = OVERRIDES
    settings.autotune_progress_bar = False
    device = torch.device("cuda", torch.cuda.current_device())
    arguments = spec.sample(spec.variant(point.variant), sizes, device, torch.Generator(device).manual_seed(0))
    arguments += spec.make_workspace(spec.variant(point.variant), device)
    found = helion.Kernel(kernel.fn, configs=[], settings=settings).autotune(arguments, force=True)
    return dict(found)
