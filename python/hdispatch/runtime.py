"""Loading bundles and registering functions: the launch table's rows. Statistics, explanations, strict mode."""

from __future__ import annotations

import inspect
import os
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from . import _C, adopted, embedded, functions, host, recorded, registry
from .bundle_reader import read_files
from .errors import ArgumentError, BundleError, HdispatchError
from .functions import Function, Key, Stream
from .ladders import Ladders
from .manifest import MANIFEST_NAME, FfiArg, Guard, Manifest, artifacts_of, ladders_of
from .replay import Replays


@dataclass(frozen=True)
class Bundle:
    """A loaded bundle.

    folder        where it was read from, a folder or an archive
    device        the CUDA device it serves, or -1: the null driver, which serves CPU tensors
    sha256        of its manifest.json, which tells it from any other
    load_seconds  how long it took to verify and load
    """

    folder: Path
    manifest: Manifest = field(repr=False)
    device: int
    pdl: bool = field(default=True, repr=False)
    early_reads: bool = field(default=True, repr=False)
    sha256: str = field(default="", repr=False)
    load_seconds: float = field(default=0.0, repr=False, compare=False)
    _table: _C.Table | None = field(default=None, repr=False, compare=False)
    _recorded: recorded.Table = field(default_factory=dict, repr=False, compare=False)

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.manifest["rows"])

    def publish(self) -> None:
        """Serve from this bundle again, where another has been loaded for its device since: without loading its code again.

        HdispatchError for one that `load` did not make.
        """
        if self._table is None:
            raise HdispatchError(f"{self.folder} was not loaded by hdispatch.load")
        _SERVING.set_bundle(self.device, self)

    def unload(self) -> None:
        """Stop serving from this bundle; its code stays in place for graphs that were captured with it."""
        _SERVING.remove_bundle(self)


@dataclass(frozen=True, eq=False)
class Registration:
    """A function in the launch table of a device (-1: the null driver)."""

    function: Function
    device: int

    def unregister(self) -> None:
        """Take its rows out: what would serve them without it does, a bundle or an earlier registration."""
        _SERVING.remove(self)


class _Update:
    """Stands for an update that is under way."""


class _Serving:
    """The bundles and functions that serve each device (index, or -1 for the null driver), and the table made of them.

    One thread at a time changes it; calls take no lock. The collector may run a finalizer that changes it in the middle of a
    change of the same thread: then the outer change goes on until every table is what it should be.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._bundles: dict[int, Bundle] = {}
        self._registered: dict[int, list[Registration]] = {}  # by device, in order
        self._stale: set[int] = set()  # devices whose table is not what it should be
        self._update_under_way: weakref.ref[_Update] | None = None
        # The child of a fork has one thread: it finds the lock free and the tables whole.
        os.register_at_fork(before=self._lock.acquire, after_in_parent=self._lock.release, after_in_child=self._lock.release)

    def bundles(self) -> list[Bundle]:
        """The bundles that serve, in the order of loading."""
        return list(self._bundles.values())

    def registrations(self) -> list[Registration]:
        """The registrations, by device, then in order."""
        return [each for device in sorted(self._registered) for each in tuple(self._registered[device])]

    def set_bundle(self, device: int, bundle: Bundle | None) -> None:
        """Serve a device from a bundle, or from what is registered alone."""
        with self._lock:
            former = self._bundles.get(device)
            self._change(device, lambda: self._put(device, bundle), lambda: self._put(device, former))

    def remove_bundle(self, bundle: Bundle) -> None:
        """Stop serving from a bundle, if its device is served from it."""
        with self._lock:
            if self._bundles.get(bundle.device) is bundle:
                self.set_bundle(bundle.device, None)

    def add(self, registration: Registration) -> None:
        """Serve from a function too."""
        with self._lock:
            mine = self._registered.setdefault(registration.device, [])
            self._change(
                registration.device,
                lambda: mine.append(registration),
                lambda: mine.remove(registration) if registration in mine else None,
            )

    def remove(self, registration: Registration) -> None:
        """Serve from a function no longer; nothing happens the second time."""
        with self._lock:
            mine = self._registered.get(registration.device, [])
            if registration in mine:
                at = mine.index(registration)
                self._change(
                    registration.device,
                    lambda: mine.remove(registration),
                    lambda: None if registration in mine else mine.insert(at, registration),
                )
            self._update()  # what an interrupted change left behind

    def _put(self, device: int, bundle: Bundle | None) -> None:
        self._bundles.pop(device, None)
        if bundle is not None:
            self._bundles[device] = bundle
        recorded.serve(device, bundle._recorded if bundle is not None else {})

    def _change(self, device: int, change: Callable[[], None], revert: Callable[[], None]) -> None:
        # Stale before it changes: an interrupt anywhere leaves a table that the next change publishes.
        self._stale.add(device)
        try:
            change()
            self._update()
        except BaseException:
            self._stale.add(device)
            revert()
            self._update()
            raise

    def _update(self) -> None:
        if self._update_under_way is not None and self._update_under_way() is not None:
            return  # inside an update of this thread, which will see to it
        mine = _Update()  # gone with this call, even where an interrupt skips the end of it
        self._update_under_way = weakref.ref(mine)
        try:
            while self._stale:
                each = next(iter(self._stale))
                self._stale.discard(each)  # a finalizer that changes it meanwhile makes it stale again
                try:
                    _publish(each, self._bundles.get(each), tuple(self._registered.get(each, ())))
                except BaseException:
                    self._stale.add(each)
                    raise
        finally:
            self._update_under_way = None


_SERVING = _Serving()


def load(
    folder: str | os.PathLike[str] | None = None,
    *,
    device: torch.device | int | str | None = None,
    driver: str = "cuda",
    pdl: bool = True,
    early_reads: bool = True,
    sha256: str | None = None,
) -> Bundle:
    """Verify a bundle and put all of it on a device: every module is loaded now, none on a call.

    A bundle is code, which runs in this process: load those alone whose builder you trust.

    folder   of a bundle, or the .tar.xz of one, or b.tar.xz/NAME of several; default $HDISPATCH_BUNDLE, else the one that the
             package was installed with for the device, by its architecture and name (with the null driver: the first)
    device   a CUDA device; default the current one. A second load for the same device replaces the first; what is
             registered for the device stays.
    driver   "cuda", or "null": serve CPU tensors, do everything but the launch (see `hdispatch.testing.null`).
    pdl      False: launch without the programmatic-dependent-launch attribute.
    early_reads
             False: launch kernels that read weights before they wait for their predecessors without that attribute, so that
             they begin when all before them has ended. Needed where a kernel that is not of this runtime writes such weights
             and releases its dependents (griddepcontrol.launch_dependents) before it has written them. Kernels that do not
             know of PDL, copies and graphs need it not, nor do launches of hdispatch, which are looked after.
    sha256   the digest that manifest.json must have, as `hdispatch build` and `hdispatch inspect` print it: any other bundle
             is refused.

    Raises `BundleError` naming the file and what is wrong with it, or `DriverError`; then nothing of it is loaded.
    """
    _check_driver(driver)
    start = time.perf_counter()
    index = -1
    if driver == "cuda" and folder is None:  # which of the package's own depends on the device
        index = _cuda_device("", device)
    if folder is None:
        folder = embedded.choose(index)
    files = read_files(folder, sha256=sha256)
    manifest = files.manifest
    if driver == "cuda":
        index = _cuda_device(f"{folder}: ", device)
        check_target(folder, manifest, index)
        check_host(folder, manifest)
    kernels = recorded.table_of(Path(folder), manifest, files.contents)
    builder = _builder(index, pdl, early_reads)
    _fill(builder, Path(folder), manifest, files.contents)
    table = builder.finish()
    seconds = time.perf_counter() - start
    bundle = Bundle(Path(folder), manifest, index, pdl, early_reads, files.sha256, seconds, table, kernels)
    _SERVING.set_bundle(index, bundle)
    return bundle


def register(
    op: _C.Op | str,
    key: Key,
    function: object,
    *,
    args: Sequence[FfiArg] | None = None,
    guards: Sequence[Guard] = (),
    stream: Stream = "environment",
    pdl: bool = False,
    early: Sequence[str] = (),
    m_range: tuple[int, int] | None = None,
    label: str = "(registered)",
    device: torch.device | int | str | None = None,
    driver: str = "cuda",
) -> Registration:
    """Let a TVM-FFI function of this process serve calls of an op, in the place of whatever row has the key.

    function  a `tvm_ffi.Function`, as `tvm_ffi.load_module` and `tvm_ffi.cpp.load_inline` give, or what wraps one, as
              CuteDSL's compiled functions. It is called as it is, without Python, and kept for ever. It launches on the
              stream that it is given, and writes the op's mutated arguments.
    args      its arguments (`manifest.FfiArg`); by default the op's in order, tensors as DLTensor views (a C++ function takes
              `tvm::ffi::TensorView`), None for those that the variant does not have; then the op's workspace
    guards    facts (`manifest.Guard`) without which the call goes to the fallback, counted. The function's own checks raise
              instead, and take microseconds to: what a call may have goes here or into `align` of its argument
    stream    how it gets the stream: from TVM FFI's "environment" (TVMFFIEnvGetStream), as its last "argument" (or as `args`
              say), or not at all ("none")
    pdl       its kernels wait for their predecessors themselves; see `FfiArg`
    early     the tensor arguments that they read before they wait; see `manifest.RecordHead`
    m_range   the Ms for which it is right, both ends included; default all. It is never called with M = 0
    label     what errors, `explain` and `stats` call it
    device, driver   as those of `load`; with "null" it serves CPU tensors, and is called

    Tables are frozen: this makes and publishes a new one, with the rows of the bundle that is loaded. Bundles may be loaded
    before and after. Of several registrations with one key the last one serves. A function that loads its CUDA module on its
    first call must be called once before a graph is captured. What it raises is a `FunctionError`.
    """
    _check_driver(driver)
    made = functions.make(
        op, key, function, args=args, guards=guards, stream=stream, pdl=pdl, early=early, m_range=m_range, label=label
    )
    index = _cuda_device("", device) if driver == "cuda" else -1
    functions.add_all(_builder(index, True, True), [made], {})  # what cannot be a row is refused here, on its own
    registration = Registration(made, index)
    _SERVING.add(registration)
    return registration


def registered() -> list[Registration]:
    """The current registrations, by device, then in order."""
    return _SERVING.registrations()


def _publish(device: int, bundle: Bundle | None, registered: Sequence[Registration]) -> None:
    """Serve a bundle with what is registered on top of it."""
    if not registered:
        if bundle is None or bundle._table is None:
            _C.withdraw(device)
        else:
            _C.publish(bundle._table)
        return
    builder = _builder(device, bundle.pdl if bundle else True, bundle.early_reads if bundle else True)
    ladders: dict[str, Ladders] = {}
    if bundle is not None and bundle._table is not None:
        builder.extend(bundle._table)
        ladders = {name: ladders_of(entry) for name, entry in bundle.manifest["ops"].items()}
    functions.add_all(builder, [each.function for each in registered], ladders)
    builder.publish()


def _builder(device: int, pdl: bool, early_reads: bool) -> _C.TableBuilder:
    return _C.TableBuilder(device, torch.cuda.device_count() if device >= 0 else 0, pdl, early_reads)


def _check_driver(driver: str) -> None:
    if driver not in ("cuda", "null"):
        raise HdispatchError(f"driver is {driver!r}; it takes 'cuda' or 'null'")


def _cuda_device(where: str, device: torch.device | int | str | None) -> int:
    if not torch.cuda.is_available():
        raise BundleError(
            f"{where}no CUDA device here ({_C.driver_missing() or 'torch sees none'}); "
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
    most = getattr(here, "shared_memory_per_block_optin")  # noqa: B009  (absent from torch's stubs)
    # Code for sm_90a and newer runs on exactly that compute capability; persistent kernels have the SM count compiled in.
    same = tuple(target["compute_capability"]) == (here.major, here.minor) and target["sm_count"] == here.multi_processor_count
    if same and target["shared_memory"] > most:
        raise BundleError(
            f"{Path(folder) / MANIFEST_NAME}: built for {target['shared_memory']} bytes of shared memory per block; "
            f"cuda:{device} has {most}"
        )
    if not same:
        raise BundleError(
            f"{Path(folder) / MANIFEST_NAME}: built for {target['name']} ({target['arch']}, {target['sm_count']} SMs); "
            f"cuda:{device} is {here.name} (compute capability {here.major}.{here.minor}, {here.multi_processor_count} SMs). "
            "Build one with `hdispatch build --target native`; this one can be inspected, or loaded with driver='null'"
        )


def check_host(folder: str | os.PathLike[str], manifest: Manifest) -> None:
    """Raise `BundleError` unless the bundle's host functions, if it has any, run on this machine's CPU."""
    if "host" in manifest:
        host.check(str(Path(folder) / MANIFEST_NAME), manifest["host"])


def _fill(builder: _C.TableBuilder, folder: Path, manifest: Manifest, contents: dict[str, bytes]) -> None:
    where = folder / MANIFEST_NAME
    found: dict[str, _C.Op] = {}
    for name, entry in manifest["ops"].items():
        if not registry.is_defined(name):
            raise BundleError(
                f"{where}: holds op {name!r}, which is not defined here: install the package that it was built from, or call "
                f"hdispatch.registry.define_package(FOLDER_OR_PACKAGE) first; there are {', '.join(sorted(registry.names()))}"
            )
        registry.spec(name).check_same(entry, where, "rebuild")
        found[name] = registry.get(name)
    # A record belongs to the op of its rows; one that no row uses is left out.
    owners = {row["record"]: row["op"] for row in manifest["rows"]}
    try:
        for name, op in found.items():
            ladders = ladders_of(manifest["ops"][name])
            builder.set_ladder(op, ladders.m, ladders.second)
        only_recorded = {entry["file"] for entry in manifest.get("recorded", [])}
        only_recorded -= {file for record in manifest["records"] for file in artifacts_of(record)}
        libraries = {record["file"] for record in manifest["records"] if record["launcher"] == "tvm_ffi"}
        for name, content in contents.items():
            if name in only_recorded:  # Triton loads those
                continue
            if name in libraries:
                builder.add_library(name, content)
            else:
                builder.add_module(name, content, manifest["files"][name]["sha256"])
        records = {i: builder.add_record(found[op], manifest["records"][i]) for i, op in sorted(owners.items())}
        for row in manifest["rows"]:
            builder.add_row(found[row["op"]], row["variant"], row["K"], row["N"], row["bucket"], records[row["record"]])
    except HdispatchError as error:
        raise type(error)(f"{where}: {error}") from error


def loaded() -> list[Bundle]:
    """The bundles that serve calls now."""
    return _SERVING.bundles()


def stats(*, reset: bool = False) -> dict[str, dict[str, Any]]:
    """Counts of each op: {op: {"hits": n, "empty": n, "fallbacks": n, "misses": {reason: n}}}.

    hits are launches; empty are calls with M = 0; every miss has a reason ("no table", "no row", "guard: …") and, unless
    strict mode raised, a fallback. Sequences come behind by their names: hits are calls that were launched as a whole, misses
    name the op of the step, and a fallback is a call whose steps were made one by one; a replay (`Replays`) is a hit. Then
    adopted kernels, as "adopted module.name": hits are launches from C++, empty those of an empty grid, and a fallback is a
    call that Triton made. `reset` starts again from zero after reading.
    """
    found = {name: _C.stats(registry.get(name)) for name in registry.names()} | _C.sequence_stats() | _adopted_stats()
    if reset:
        for name in registry.names():
            _C.reset_stats(registry.get(name))
        _C.reset_sequence_stats()
        _C.reset_adopted_stats()
    return found


def _adopted_stats() -> dict[str, dict[str, Any]]:
    """Kernels of one name, as Helion makes one for each config, are counted together."""
    found: dict[str, dict[str, Any]] = {}
    for name, each in _C.adopted_stats():
        total = found.setdefault(f"adopted {name}", {"hits": 0, "empty": 0, "fallbacks": 0, "misses": {}})
        for key in ("hits", "empty", "fallbacks"):
            total[key] += each[key]
        for reason, count in each["misses"].items():
            total["misses"][reason] = total["misses"].get(reason, 0) + count
    return found


def explain(op: Any, /, *args: object, **by_name: object) -> str:
    """One call in words, step by step, without launching it: variant, sizes, bucket, key, row, guards, grid.

    Arguments are given as the call takes them, by name too.
    Of a frozen sequence, with its slots: a line a step, the row that serves it or why none does; of `Replays` likewise, and
    what becomes of the call. Of an adopted kernel, or of code whose kernels are adopted, alone: a line for each key that has
    come, and why the ones that are not served are not.
    """
    if by_name and isinstance(op, (_C.Op, _C.FunctionalOp)):
        args, by_name = _in_order(op, args, by_name), {}
    if isinstance(op, _C.FunctionalOp):
        return _C.explain(op.out, *args, *_results(op, args))
    if isinstance(op, Replays):
        return op.explain(*args, **by_name)
    if not isinstance(op, (_C.Op, _C.Sequence)) and (learnt := adopted.explain(op)) is not None:
        return learnt
    return _C.explain(op, *args, **by_name)


def _in_order(op: _C.Op | _C.FunctionalOp, args: Sequence[object], by_name: Mapping[str, object]) -> tuple[object, ...]:
    """The arguments of a call, with those that have a default and are left out; results only where they are given."""
    try:
        bound = inspect.signature(op).bind(*args, **by_name)
    except TypeError as error:
        raise ArgumentError(f"{op.name}: {error}; it takes {inspect.signature(op)}") from error
    returned = registry.spec(op.name).returned if isinstance(op, _C.FunctionalOp) else ()
    given = bound.arguments.keys()
    bound.apply_defaults()
    left = {arg.name for arg in returned} - given
    return tuple(value for name, value in bound.arguments.items() if name not in left)


def _results(op: _C.FunctionalOp, args: Sequence[object]) -> list[torch.Tensor]:
    """Tensors as the op returns them for these arguments; nothing if they are given."""
    spec = registry.spec(op.name)
    if len(args) == len(spec.args):
        return []
    meta = [arg.to("meta") if isinstance(arg, torch.Tensor) else arg for arg in args]
    found = getattr(torch.ops.hdispatch, op.name).default(*meta)
    device = next(arg.device for arg in args if isinstance(arg, torch.Tensor))
    return [torch.empty_like(each, device=device) for each in (found if isinstance(found, tuple) else (found,))]


class _Block:
    """A `with strict():` block that is open, or was."""

    def __init__(self, owner: strict, on: bool) -> None:
        self.owner, self.on, self.is_open = owner, on, True


#: the blocks of this context, the innermost last
_BLOCKS: ContextVar[tuple[_Block, ...]] = ContextVar("hdispatch.strict", default=())


class strict:
    """Inside `with hdispatch.strict():` a miss raises `MissError`, naming the shape, the failed guard and the nearest rows.

    A block holds for the thread, or the asyncio task, that is in it; blocks may nest and overlap, and the innermost counts.
    `with hdispatch.strict(False):` lets misses fall back inside a strict block or process. For the process: `set_strict`.
    """

    def __init__(self, on: bool = True) -> None:
        self._on = bool(on)
        self._open: list[_Block] = []

    def __enter__(self) -> None:
        block = _Block(self, self._on)
        self._open.append(block)
        _BLOCKS.set((*(each for each in _BLOCKS.get() if each.is_open), block))
        _C.add_strict_blocks(1)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        here = [each for each in _BLOCKS.get() if each.owner is self and each.is_open]
        if not (here or self._open):
            raise HdispatchError("this strict block is not open")
        block = (here or self._open)[-1]  # of this context, unless the block is left in another than it was entered in
        block.is_open = False
        self._open.remove(block)
        _BLOCKS.set(tuple(each for each in _BLOCKS.get() if each.is_open))
        _C.add_strict_blocks(-1)


def set_strict(on: bool = True) -> None:
    """Strict mode for the whole process, wherever no `with strict(…):` block says otherwise."""
    _C.set_strict(on)


def _is_strict() -> bool:
    innermost = next((each for each in reversed(_BLOCKS.get()) if each.is_open), None)
    return _C.is_strict() if innermost is None else innermost.on


_C.set_strict_query(_is_strict)
recorded._is_strict = _is_strict
