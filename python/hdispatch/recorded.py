"""Recorded Triton kernels of a bundle: code for specializations that are compiled before the process that serves begins.

`hdispatch.load` of a bundle that `hdispatch build --record` made serves them from their first call: where Triton would
compile a specialization, it gets the bundle's. That is before anything else of Triton's, so that whatever launches through
Triton is reached: autotuners, Helion, `torch.library.wrap_triton`, adopted kernels. A specialization that the bundle does not
have compiles as before, and is counted; in strict mode it raises `MissError`, which names it.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import re
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from .errors import BundleError, MissError
from .manifest import MANIFEST_NAME, Manifest, Recorded, Refused
from .recorder import REFUSALS


@dataclass(frozen=True)
class RecordedKernel:
    """One compiled specialization.

    entry     what the manifest has of it: kernel, key, signature, constants, attributes, options
    cubin     its code
    metadata  Triton's: name (of the entry point), num_warps, num_ctas, shared, cluster_dims, global_scratch_size,
              profile_scratch_size, launch_pdl, launch_cooperative_grid, tensordesc_meta, …
    """

    entry: Recorded
    cubin: bytes
    metadata: Mapping[str, Any]

    def compiled(self, source: Any) -> Any:
        """Triton's `CompiledKernel` of it. `source` is what Triton would compile, its `ASTSource`."""
        kernel = object.__new__(type(self.prepared))
        vars(kernel).update(vars(self.prepared), src=source)
        return kernel

    @cached_property
    def prepared(self) -> Any:
        """The same without its source: half a millisecond, which `load` takes and not a kernel's first call."""
        name = self.metadata["name"][:150]
        with tempfile.TemporaryDirectory(prefix="hdispatch-recorded-") as folder:
            files = {f"{name}.json": self.entry["metadata"].encode(), f"{name}.cubin": self.cubin}
            for file, content in files.items():
                Path(folder, file).write_bytes(content)
            paths = {file: str(Path(folder, file)) for file in files}
            kernel = importlib.import_module("triton.compiler").CompiledKernel(None, paths, self.metadata["hash"])
        kernel.metadata_group = {}
        return kernel


@dataclass(frozen=True)
class RefusedKernel:
    """A specialization that Triton's compiler refused in the run that was recorded, as autotuners try some.

    entry   what the manifest has of it: kernel, key, the error's name and message
    """

    entry: Refused

    def error(self) -> Exception:
        """What the compiler would raise; autotuners leave the config out then."""
        name = self.entry["error"]
        kind = getattr(importlib.import_module(REFUSALS[name]), name)
        if name == "PTXASError":  # its text has this before the message
            found: Exception = kind(self.entry["message"].removeprefix("PTXAS error: "))
        else:  # a source without a place in it is all of the text, and what a copy is made of
            found = kind(self.entry["message"], None)
        vars(found)["is_recorded"] = True  # for a recorder: Triton refused nothing now
        return found


#: (kernel, hash of its source, Triton's key) -> the compiled or refused specialization, of one device.
Table = Mapping[tuple[str, str, str], RecordedKernel | RefusedKernel]

_tables: dict[int, Table] = {}
_warmed: set[int] = set()
_lock = threading.Lock()
_served: Counter[str] = Counter()
_missed: Counter[str] = Counter()
#: The refused that were counted: Triton asks for code once, for what is refused whenever an autotuner tries it.
_refused: set[tuple[int, str, str, str]] = set()
_is_strict: Callable[[], bool] = lambda: False  # noqa: E731


def table_of(where: Path, manifest: Manifest, contents: Mapping[str, bytes]) -> Table:
    """The recorded kernels of a bundle. `BundleError` if they are another Triton's than the one that is installed."""
    entries, refused = manifest.get("recorded", []), manifest.get("recorded_refused", [])
    if entries or refused:
        _check_triton(where, manifest)
    table: dict[tuple[str, str, str], RecordedKernel | RefusedKernel] = {
        (entry["kernel"], entry["source_hash"], entry["key"]): RecordedKernel(
            entry, contents[entry["file"]], json.loads(entry["metadata"])
        )
        for entry in entries
    }
    return table | {(entry["kernel"], entry["source_hash"], entry["key"]): RefusedKernel(entry) for entry in refused}


def _check_triton(where: Path, manifest: Manifest) -> None:
    try:
        here = version("triton")
    except PackageNotFoundError as error:
        raise BundleError(f"{where / MANIFEST_NAME}: holds recorded Triton kernels, and triton is not installed") from error
    built = manifest.get("recorded_tools", manifest["tools"]).get("triton")
    if built != here:
        raise BundleError(
            f"{where / MANIFEST_NAME}: its recorded kernels are triton {built}'s; triton {here} is installed, which has other "
            "keys and launches: build the recording again with it"
        )


def serve(device: int, table: Table) -> None:
    """Serve a device's specializations from a table, from now on; an empty one: from none."""
    kernels = [each for each in table.values() if not isinstance(each, RefusedKernel)]
    for kernel in kernels:
        kernel.prepared  # noqa: B018
    if kernels and device not in _warmed:
        _warm(device, min(kernels, key=lambda kernel: kernel.metadata["shared"]).prepared)
        _warmed.add(device)
    _make_launchers(device, kernels)
    with _lock:
        if table:
            _install()
            _tables[device] = table
        else:
            _tables.pop(device, None)


def lookup(kernel: Any, key: str, device: int) -> RecordedKernel | None:
    """What a device's bundle has for a `triton.JITFunction` and Triton's key of a specialization (`compute_cache_key`).

    None, too, for one that the compiler refuses.
    """
    found = _lookup(kernel, key, device)
    return None if isinstance(found, RefusedKernel) else found


def _lookup(kernel: Any, key: str, device: int) -> RecordedKernel | RefusedKernel | None:
    table = _tables.get(device)
    if table is None:
        return None
    return table.get((f"{kernel.fn.__module__}.{kernel.fn.__qualname__}", kernel.cache_key, key))


def stats(*, reset: bool = False) -> dict[str, dict[str, int]]:
    """What was wanted of recorded kernels: {"served": {kernel: specializations}, "compiled": {kernel: those no bundle has}}."""
    with _lock:
        found = {"served": dict(_served), "compiled": dict(_missed)}
        if reset:
            _served.clear()
            _missed.clear()
    return found


def _warm(device: int, kernel: Any) -> None:
    """What Triton imports, asks and compiles for itself in a process's first call: 40 ms, and a second where its cache is cold.

    And what the driver does for the first code that the process loads, here that of some kernel.
    """
    for module in ("triton.experimental.gluon.nvidia.hopper", "triton.tools.tensor_descriptor"):
        importlib.import_module(module)
    some = importlib.import_module("triton.language.standard").zeros_like
    if not hasattr(some, "cache_key"):  # interpreted, as all of the process is: nothing is compiled, nothing launched
        return
    some.cache_key  # noqa: B018  0.6 ms of the first function whose source is hashed
    if device >= 0:
        driver = importlib.import_module("triton.runtime.driver").driver.active
        target = driver.get_current_target()
        importlib.import_module("triton.compiler").make_backend(target).parse_options({})
        some.create_binder()
        if utils := getattr(driver, "utils", None):  # a described GPU's driver has none
            if kernel.metadata.shared > importlib.import_module("triton.compiler.compiler").max_shared_mem(device):
                return  # none of the bundle's launches here
            with torch.cuda.device(device) if torch.cuda.is_available() else nullcontext():
                utils.load_binary(kernel.name, kernel.kernel, kernel.metadata.shared, device)


def _make_launchers(device: int, kernels: Sequence[RecordedKernel]) -> None:
    """Triton 3.6 compiles a launcher in C for each list of types: 130 to 300 ms, which `load` takes and not a first call.

    They go into Triton's own cache, on all cores. Later versions have one launcher. A bundle that was built before parameters
    were in its manifest has them made in first calls.
    """
    if device < 0 or not hasattr(importlib.import_module("triton.backends.nvidia.driver"), "make_launcher"):
        return
    launcher = getattr(importlib.import_module("triton.runtime.driver").driver.active, "launcher_cls", None)
    if launcher is None:
        return
    made = {_launcher_key(kernel.entry): kernel for kernel in kernels if "parameters" in kernel.entry}

    def make(kernel: RecordedKernel) -> None:
        types = {name: _triton_type(kernel.entry["signature"][name]) for name in kernel.entry["parameters"]}
        launcher(SimpleNamespace(signature=types, constants={}), kernel.prepared.metadata)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for done in [pool.submit(make, kernel) for kernel in made.values()]:
            done.result()


def _launcher_key(entry: Recorded) -> str:
    """What a launcher depends on: it takes pointers to anything as one type. Descriptors of tensors come in several forms."""
    types = json.dumps([entry["signature"][name] for name in entry["parameters"]])
    return re.sub(r"\*\w+", "*", types) + (entry["metadata"] if "tensordesc" in types else "")


def _triton_type(kind: Any) -> Any:
    """A parameter's type as Triton has it: of a tuple the types of its items."""
    return tuple(_triton_type(each) for each in kind["tuple"]) if isinstance(kind, dict) else kind


def _install() -> None:
    """Put this before Triton's compiler, once."""
    JITFunction = importlib.import_module("triton.runtime.jit").JITFunction
    plain = JITFunction._do_compile
    if getattr(plain, "is_recorded", False):
        return

    def compile_or_take(
        self: Any, key: str, signature: Any, device: int, constexprs: Any, options: Any, attrs: Any, warmup: bool
    ) -> Any:
        if device not in _tables:
            return plain(self, key, signature, device, constexprs, options, attrs, warmup)
        found = None if _is_overridden() else _lookup(self, key, device)
        name = f"{self.fn.__module__}.{self.fn.__qualname__}"
        with _lock:
            if not isinstance(found, RefusedKernel):
                (_missed if found is None else _served)[name] += 1
            elif (asked := (device, name, self.cache_key, key)) not in _refused:
                _refused.add(asked)
                _served[name] += 1
        if found is None:
            if _is_strict():
                raise MissError(
                    f"{name}: no recorded kernel of the bundle has the key {key}; record a run that has it, and build again"
                )
            return plain(self, key, signature, device, constexprs, options, attrs, warmup)
        if isinstance(found, RefusedKernel):
            return _refuse(found)
        cache = self.device_caches[device][0]
        cache[key] = kernel = found.compiled(self.ASTSource(self, signature, constexprs, attrs))
        return kernel

    compile_or_take.is_recorded = True  # type: ignore[attr-defined]
    JITFunction._do_compile = compile_or_take


def _refuse(found: RefusedKernel) -> Any:
    """Raises the error, or, where Triton compiles in other threads, gives what raises it when it is waited for."""
    mode = importlib.import_module("triton.runtime._async_compile").active_mode.get()
    if mode is None:
        raise found.error()

    def fail() -> None:
        raise found.error()

    entry = found.entry
    # One function for a kernel that was made; since Triton 3.9 another for one that was not.
    afterwards = len(inspect.signature(mode.submit).parameters) - 2
    return mode.submit((entry["kernel"], entry["source_hash"], entry["key"]), fail, *[lambda _: None] * afterwards)


def _is_overridden() -> bool:
    """Whether the user asks Triton for other code than it would make: then it is Triton's to make."""
    knobs = importlib.import_module("triton.knobs")
    return bool(
        knobs.compilation.override or knobs.compilation.always_compile or knobs.compilation.dump_ir or knobs.runtime.interpret
    )
