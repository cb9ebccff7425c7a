"""Loading bundles into the launch table, statistics, explanations, strict mode."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from . import _C, ops
from .errors import BundleError, HdispatchError
from .manifest import MANIFEST_NAME, Manifest, read_bundle

#: device (index, or -1 for the null driver) -> the bundle that serves it
_LOADED: dict[int, Bundle] = {}
_LOADING = threading.Lock()  # keeps _LOADED and the tables in step; no call takes it


@dataclass(frozen=True)
class Bundle:
    """A loaded bundle. `device` is the CUDA device it serves, or -1: the null driver, which serves CPU tensors."""

    folder: Path
    manifest: Manifest = field(repr=False)
    device: int

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.manifest["rows"])

    def unload(self) -> None:
        """Stop serving from this bundle; its code stays in place for graphs that were captured with it."""
        with _LOADING:
            if _LOADED.get(self.device) is self:
                _C.withdraw(self.device)
                del _LOADED[self.device]


def load(
    folder: str | os.PathLike[str],
    *,
    device: torch.device | int | str | None = None,
    driver: str = "cuda",
    pdl: bool = True,
) -> Bundle:
    """Verify a bundle and put all of it on a device: every module is loaded now, none on a call.

    device   a CUDA device; default the current one. A second load for the same device replaces the first.
    driver   "cuda", or "null": serve CPU tensors, do everything but the launch (see `hdispatch.testing.null`).
    pdl      False: launch without the programmatic-dependent-launch attribute.

    Raises `BundleError` naming the file and what is wrong with it, or `DriverError`; then nothing of it is loaded.
    """
    if driver not in ("cuda", "null"):
        raise HdispatchError(f"driver is {driver!r}; it takes 'cuda' or 'null'")
    manifest, contents = read_bundle(folder)
    index, count = -1, 0
    if driver == "cuda":
        index, count = _cuda_device(folder, device), torch.cuda.device_count()
        check_target(folder, manifest, index)
    builder = _C.TableBuilder(index, count, pdl)
    _fill(builder, Path(folder), manifest, contents)
    bundle = Bundle(Path(folder), manifest, index)
    with _LOADING:
        builder.publish()
        _LOADED[index] = bundle
    return bundle


def _cuda_device(folder: str | os.PathLike[str], device: torch.device | int | str | None) -> int:
    if not torch.cuda.is_available():
        raise BundleError(
            f"{folder}: no CUDA device here ({_C.driver_missing() or 'torch sees none'}); "
            "hdispatch.load(DIR, driver='null') loads it without launching, hdispatch.read_bundle(DIR) reads it"
        )
    chosen = torch.device("cuda", device) if isinstance(device, int) else torch.device(device or "cuda")
    if chosen.type != "cuda":
        raise HdispatchError(f"device is {chosen}; it takes a CUDA device")
    torch.cuda.init()  # type: ignore[no-untyped-call]
    return torch.cuda.current_device() if chosen.index is None else chosen.index


def check_target(folder: str | os.PathLike[str], manifest: Manifest, device: int) -> None:
    """Raise `BundleError` unless the bundle's code runs on that CUDA device."""
    target = manifest["target"]
    here = torch.cuda.get_device_properties(device)
    # Code for sm_90a and newer runs on exactly that compute capability; persistent kernels have the SM count compiled in.
    if tuple(target["compute_capability"]) != (here.major, here.minor) or target["sm_count"] != here.multi_processor_count:
        raise BundleError(
            f"{Path(folder) / MANIFEST_NAME}: built for {target['name']} ({target['arch']}, {target['sm_count']} SMs); "
            f"cuda:{device} is {here.name} (compute capability {here.major}.{here.minor}, {here.multi_processor_count} SMs). "
            "Build one with `hdispatch build --target native`; this one can be inspected, or loaded with driver='null'"
        )


def _fill(builder: _C.TableBuilder, folder: Path, manifest: Manifest, contents: dict[str, bytes]) -> None:
    where = folder / MANIFEST_NAME
    found: dict[str, _C.Op] = {}
    for name, entry in manifest["ops"].items():
        if name not in ops.names():
            raise BundleError(
                f"{where}: holds op {name!r}, which is not defined here; there are {', '.join(sorted(ops.names()))}"
            )
        spec = ops.spec(name)
        if entry["schema"] != spec.schema() or not entry["variants"].items() <= spec.variant_arguments().items():
            raise BundleError(
                f"{where}: built for {entry['schema']}; the installed op is {spec.schema()} "
                "with other variants or arguments; rebuild"
            )
        found[name] = ops.get(name)
    # A record belongs to the op of its rows; one that no row uses is left out.
    owners = {row["record"]: row["op"] for row in manifest["rows"]}
    try:
        for name, op in found.items():
            builder.set_ladder(op, manifest["ops"][name]["ladder"])
        for name, content in contents.items():
            builder.add_module(name, content)
        records = {i: builder.add_record(found[op], manifest["records"][i]) for i, op in sorted(owners.items())}
        for row in manifest["rows"]:
            builder.add_row(found[row["op"]], row["variant"], row["K"], row["N"], row["bucket"], records[row["record"]])
    except HdispatchError as error:
        raise type(error)(f"{where}: {error}") from error


def loaded() -> list[Bundle]:
    """The bundles that serve calls now."""
    return list(_LOADED.values())


def stats(*, reset: bool = False) -> dict[str, dict[str, Any]]:
    """What each op has done: {op: {"hits": n, "empty": n, "fallbacks": n, "misses": {reason: n}}}.

    hits are launches; empty are calls with M = 0; every miss has a reason ("no table", "no row", "guard: …") and, unless
    strict mode raised, a fallback. `reset` starts again from zero after reading.
    """
    found = {name: _C.stats(ops.get(name)) for name in ops.names()}
    if reset:
        for name in found:
            _C.reset_stats(ops.get(name))
    return found


def explain(op: _C.Op, *args: object) -> str:
    """One call in words, step by step, without launching it: variant, sizes, bucket, key, row, guards, grid."""
    return _C.explain(op, *args)


class strict:
    """In strict mode a miss raises `MissError`, naming the shape, the failed guard and the nearest rows.

    `hdispatch.strict()` turns it on for the process, `hdispatch.strict(False)` off; `with hdispatch.strict(): …` for a block.
    """

    def __init__(self, on: bool = True) -> None:
        self._before = _C.set_strict(on)

    def __enter__(self) -> None:
        """Strict mode is on already."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        _C.set_strict(self._before)
