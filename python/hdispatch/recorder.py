"""What writes a recording: hooked into Triton, in this process or in those of a command; see recording.py for what it writes.

It imports nothing but the standard library, so that a process which `hdispatch record` started takes it by its file, before
torch, Triton or hdispatch are there.
"""

from __future__ import annotations

import contextlib
import enum
import fcntl
import functools
import hashlib
import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import json
import math
import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

#: Names the file that a process which `hdispatch record` started appends to.
VARIABLE = "HDISPATCH_RECORD"

#: The module of Triton's after whose import a hook can be set.
_TRITON = "triton.runtime.jit"

#: What Triton's compiler raises for a config that an autotuner then leaves out, by name, and where it is defined.
REFUSALS = {"CompileTimeAssertionFailure": "triton.compiler.errors", "PTXASError": "triton.runtime.errors"}


def encode(value: Any) -> Any:
    """A value as JSON: what JSON lacks becomes `{"tuple": […]}`, `{"float": "nan"}`, `{"dtype": "fp32"}`, `{"constexpr": …}`,
    `{"function": "module:qualname:hash"}`, `{"enum": "module:qualname:MEMBER"}`; and what cannot be made again
    `{"opaque": "what it looks like"}`.
    """
    kind = type(value).__name__
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(value)}
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) is tuple:
        return {"tuple": [encode(each) for each in value]}
    if isinstance(value, list):
        return [encode(each) for each in value]
    if kind == "dtype" and type(value).__module__.startswith("triton"):
        return {"dtype": str(value)}
    if kind == "constexpr":
        return {"constexpr": encode(value.value)}
    if isinstance(value, enum.Enum) and value.name in type(value).__members__:
        return {"enum": f"{type(value).__module__}:{type(value).__qualname__}:{value.name}"}
    if hasattr(value, "cache_key") and hasattr(value, "fn"):
        return {"function": f"{value.fn.__module__}:{value.fn.__qualname__}:{value.cache_key}"}
    return {"opaque": repr(value)[:200]}


class Recorder:
    """Appends every specialization that Triton compiles in this process, from `begin` to `end`, to a file.

    And those that it refuses with one of `REFUSALS`: an autotuner asks for them in every process anew. A launch whose kernel
    the file has no room for raises OSError, which names the file: what was written before can be built.
    """

    def __init__(self, file: str | os.PathLike[str]) -> None:
        self.file = Path(file).absolute()
        self.count = 0
        self._lock = threading.Lock()
        self._written: set[str] = set()
        self._refused: set[tuple[str, ...]] = set()
        self._hook: Callable[..., Any] | None = None
        self._before: Any = None
        self._compile: Callable[..., Any] | None = None
        self._plain: Any = None
        self._is_open = False

    def begin(self) -> None:
        """Record from now on, or from when Triton is imported. OSError if the file cannot be written."""
        self._append([])
        self._is_open = True
        after_import(_TRITON, self._install)

    def end(self) -> None:
        """Record no more."""
        self._is_open = False
        mine = [each for each in sys.meta_path if isinstance(each, _AfterImport) and each.then == self._install]
        sys.meta_path[:] = [each for each in sys.meta_path if each not in mine]
        if self._hook is not None:
            runtime = sys.modules["triton"].knobs.runtime
            if runtime.jit_post_compile_hook is self._hook:  # else it is in the middle of a chain, where it does nothing
                runtime.jit_post_compile_hook = self._before
            JITFunction = sys.modules[_TRITON].JITFunction
            if JITFunction._do_compile is self._compile:
                JITFunction._do_compile = self._plain

    def _install(self, jit: ModuleType) -> None:
        if not self._is_open:
            return
        _tolerate(jit)
        runtime: Any = jit.knobs.runtime
        before = self._before = runtime.jit_post_compile_hook

        def hook(**given: Any) -> Any:
            if self._is_open and self._hook is hook:  # else an earlier block's, in the middle of a chain
                self._take(given)
            return before(**given) if before is not None else None

        self._hook = runtime.jit_post_compile_hook = hook
        self._take_refused(jit.JITFunction)

    def _take_refused(self, JITFunction: Any) -> None:
        """Triton calls no hook where its compiler raises; what no autotuner passes over is not recorded."""
        plain = self._plain = JITFunction._do_compile

        @functools.wraps(plain)  # with what plain is marked with: recorded.py asks whether it is installed
        def do_compile(
            kernel: Any, key: Any, signature: Any, device: int, constexprs: Any, options: Any, attrs: Any, warmup: bool
        ) -> Any:
            def take(error: BaseException) -> None:
                name = type(error).__name__
                if getattr(error, "is_recorded", False):  # a bundle's, as served code, which no hook sees either
                    return
                if self._is_open and self._compile is do_compile and name in REFUSALS:
                    takes_target = "target" in inspect.signature(kernel._call_hook).parameters  # Triton 3.7
                    target = kernel.device_caches[device][2:3] if takes_target else ()

                    def hook(**given: Any) -> None:
                        self._take(given, name)

                    kernel._call_hook(hook, key, signature, *target, device, constexprs, options, [attrs], warmup)

            try:
                made = plain(kernel, key, signature, device, constexprs, options, attrs, warmup)
            except Exception as error:
                take(error)
                raise
            if getattr(made, "future", None) is not None:
                _watch(made, take)
            return made

        self._compile = JITFunction._do_compile = do_compile

    def _take(self, given: Mapping[str, Any], refused: str = "") -> None:
        kernel = given["fn"].jit_function
        source = _source_of(kernel)
        line = _specialization(kernel, given, source)
        if refused:
            line["refused"] = refused
        lines = [line]
        identity = (line["module"], line["qualname"], line["source_hash"], line["key"])
        with self._lock:
            if refused and identity in self._refused:  # Triton keeps none: an autotuner asks again for each of its keys
                return
            if source is not None and source["sha256"] not in self._written:
                lines.insert(0, source)
            self._append(lines)
            self.count += 1
            if refused:
                self._refused.add(identity)
            if source is not None:
                self._written.add(source["sha256"])

    def _append(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Whole lines, also beside other processes: all of them, or none where the disk is full."""
        rest = memoryview("".join(json.dumps(line, allow_nan=False) + "\n" for line in lines).encode())
        with self.file.open("ab", buffering=0) as out:  # what a buffer keeps would be written as the file is closed
            fcntl.flock(out, fcntl.LOCK_EX)
            end = os.fstat(out.fileno()).st_size
            try:
                while rest:
                    rest = rest[out.write(rest) :]
            except OSError as error:
                with contextlib.suppress(OSError):  # of a device
                    out.truncate(end)
                raise OSError(error.errno, f"{error.strerror}, so a kernel is not in the recording", str(self.file)) from error


def _watch(made: Any, take: Callable[[BaseException], None]) -> None:
    """Of a kernel that Triton compiles in another thread: its error comes where its result is asked for."""
    plain, future = made.result, made.future  # since Triton 3.9 a kernel drops its future once that has an error

    def result(*given: Any, **named: Any) -> Any:
        try:
            return plain(*given, **named)
        finally:
            if future.done() and not future.cancelled() and (error := future.exception()) is not None:
                take(error)

    made.result = result


def _specialization(kernel: Any, given: Mapping[str, Any], source: Mapping[str, Any] | None) -> dict[str, Any]:
    compiled = given["compile"]
    data = json.loads(compiled["specialization_data"])
    return {
        "line": "specialization",
        "module": kernel.fn.__module__,
        "qualname": kernel.fn.__qualname__,
        "source_hash": kernel.cache_key,
        "module_sha256": source["sha256"] if source is not None else "",
        "key": given["key"],
        "signature": {name: encode(kind) for name, kind in compiled["signature"].items()},
        "constants": [[list(path), encode(value)] for path, value in compiled["constants"].items()],
        "attrs": [[list(path), encode(value)] for path, value in compiled["configs"][0].items()],
        "options": {name: encode(value) for name, value in _options(data).items()},
        "capability": _capability(data),
        "triton": sys.modules["triton"].__version__,
    }


def _capability(data: Mapping[str, Any]) -> int:
    """Of the GPU that a kernel was compiled for, as 90."""
    if "target" in data:
        return int(data["target"]["arch"])
    return int(str(data["options"]["arch"]).removeprefix("sm").rstrip("af"))  # Triton 3.6


def _options(data: Mapping[str, Any]) -> dict[str, Any]:
    """The compiler's options, with JSON's lists as the tuples that they were."""

    def tupled(value: Any) -> Any:
        return tuple(tupled(each) for each in value) if isinstance(value, list) else value

    return {name: tupled(value) for name, value in data["options"].items()}


def _source_of(kernel: Any) -> dict[str, Any] | None:
    """The text of the module that a kernel is in, if there is one."""
    try:
        text = Path(inspect.getsourcefile(kernel.fn) or "").read_text()
    except (OSError, TypeError, UnicodeDecodeError):
        return None
    return {
        "line": "source",
        "module": kernel.fn.__module__,
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
        "text": text,
    }


def _tolerate(jit: Any) -> None:
    """Triton writes what it gives to hooks as JSON before it calls them, and fails where a constant is none: a run that is
    recorded must not fail for that. Such a constant becomes what it looks like.
    """
    plain = jit.serialize_specialization_data
    if getattr(plain, "is_tolerant", False):
        return

    def serialize(name: Any, signature: Any, constants: Any, *others: Any) -> str:  # Triton 3.7 gives one more than 3.6
        try:
            return str(plain(name, signature, constants, *others))
        except TypeError:
            shown = {path: repr(value) for path, value in constants.items()}
            return str(plain(name, signature, shown, *others))

    serialize.is_tolerant = True  # type: ignore[attr-defined]
    jit.serialize_specialization_data = serialize


def after_import(name: str, then: Callable[[ModuleType], None]) -> None:
    """Call `then` with a module: now if it is imported, else when it has been."""
    if (module := sys.modules.get(name)) is not None:
        then(module)
    else:
        sys.meta_path.insert(0, _AfterImport(name, then))


class _AfterImport(importlib.abc.MetaPathFinder):
    """Finds one module as the finders behind it do, and calls a function when it has run."""

    def __init__(self, name: str, then: Callable[[ModuleType], None]) -> None:
        self.name, self.then = name, then

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, _target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The module's own spec, whose loader calls the function."""
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname) if path is None else importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is not None and spec.loader is not None:
            run, then = spec.loader.exec_module, self.then

            def run_then(module: ModuleType) -> None:
                run(module)
                then(module)

            spec.loader.exec_module = run_then  # type: ignore[method-assign]
        return spec


def begin_in_process() -> None:
    """For a process that `hdispatch record` started: record until it ends."""
    if file := os.environ.get(VARIABLE):
        Recorder(file).begin()
