"""Adopting kernels: one, those that a host function launches, or all Triton kernels of the process."""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any, Literal, TypeVar, overload

import torch

from .. import _C
from ..errors import HdispatchError
from . import host_code

Driver = Literal["cuda", "null"]
Kernel = TypeVar("Kernel")

_lock = threading.RLock()
_is_set_up = False
_helion_is_set_up = False
_all: Driver | None = None
#: kernels that are adopted because all are, by id: hashing one makes Triton read its source and its globals, too early
_lazy: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


@overload
def adopt(kernel: Kernel, *, driver: Driver = "cuda") -> Kernel: ...
@overload
def adopt(kernel: None = None, *, driver: Driver = "cuda") -> None: ...
def adopt(kernel: Any = None, *, driver: Driver = "cuda") -> Any:
    """Launch a kernel from C++ after its first call of each key. Returns it: nothing else in the caller's code changes.

    kernel   of `@triton.jit`, with `@triton.autotune` and `@triton.heuristics` or without; or of `@helion.kernel`; or
             Python code, whose kernels are then adopted, those that it and the code of its module that it calls name: a
             function, a method, a `torch.nn.Module`, a `torch.autograd.Function` or its `apply`, a `functools.partial`, a
             class, an object that can be called. None: all Triton kernels of the process, also those that are yet to
             come, and those that Helion launches
    driver   "null": serve tensors of the CPU and launch nothing (see `hdispatch.testing.null`), for tests

    A key is what Triton itself specializes on. The first call of one is Triton's own, and so is every call that is unusual:
    `hdispatch.stats()` counts them by reason. A decorator goes on top of Triton's.

    HdispatchError if `kernel` is not a kernel and names none, and on Python 3.13.0.
    """
    _check(driver)
    with _lock:
        if kernel is None:
            _start_all(driver)
        else:
            for each in _kernels_of(kernel):
                _adopt_this(each, driver)
    return kernel


def _check(driver: str) -> None:
    if driver not in ("cuda", "null"):
        raise HdispatchError(f"driver is {driver!r}; it takes 'cuda' or 'null'")
    if sys.version_info[:3] == (3, 13, 0):
        raise HdispatchError(
            "Python is 3.13.0, which does not tell of writes to attributes (CPython issue 125608): a hook or another `run` "
            "would be missed. adopt takes 3.13.1 or newer"
        )


def unadopt(kernel: Any = None) -> None:
    """Leave a kernel (or a function's kernels) to Triton again; None: all kernels of the process, however adopted.

    Its rows are kept, for when it is adopted again.
    """
    global _all
    with _lock:
        if kernel is not None:
            for each in _kernels_of(kernel):
                _give_back(each)
            return
        _all = None
        _lazy.clear()
        for adopted in _C.adopted_kernels():
            _C.switch_adopted(adopted, False)
        if _is_set_up:
            from . import triton_kernel

            for kernel_class in triton_kernel.CLASSES:
                _C.unpatch_class(kernel_class)
        if _helion_is_set_up:
            import helion  # type: ignore[import-untyped]

            _C.unpatch_host_class(helion.Kernel)


def explain(given: Any) -> str | None:
    """What has been learnt of a kernel, a line a key, or of each that an object's code names; None where there is none."""
    if _is_interpreted(given):
        return "not adopted: TRITON_INTERPRET=1 runs it on the CPU"
    if "triton" not in sys.modules:
        return None
    if _is_kernel(given):
        return "\n".join(_learnt(given))
    lines = []
    for each in host_code.kernels_named_by(given, _is_kernel) or ():
        lines += [f"{_name_of_kernel(each)}:", *(f"  {line}" for line in _learnt(each))]
    return "\n".join(lines) or None


def _learnt(kernel: Any) -> list[str]:
    from . import triton_kernel

    made = _entry(kernel)
    if made is None:
        return ["not adopted yet: its next call is, as all are" if _all else "not adopted"]
    state = "adopted" if _C.adopted_is_on(made) else "adopted before"
    if isinstance(made, _C.HostKernel):
        keys = _C.host_keys(made)
        shapes = [f"served    calls of one shape: {reason}" for served, exact, reason in keys if served and exact]
        every = ["served    any M" for served, exact, _ in keys if served and not exact]
        helion = [f"Helion's  {reason}" for served, _, reason in keys if not served]
        return [f"{state}, {len(keys)} key(s)", *every, *shapes, *helion]
    if isinstance(reason := vars(kernel)[triton_kernel.PARTS], str):
        inner = triton_kernel.inner_of(kernel)
        inside = [] if inner is None else ["the kernel inside:", *(f"  {line}" for line in _learnt(inner))]
        return [state, f"Triton's  every call: {reason}", *inside]
    rows = [what for _, what, _ in _C.adopted_keys(made)]
    lines = [("served    " if what.startswith("block ") else "Triton's  ") + what for what in rows]
    return [f"{state}, {len(rows)} key(s)", *lines]


def _name_of_kernel(kernel: Any) -> str:
    from . import triton_kernel

    if not _is_helion(kernel):
        return triton_kernel.name_of(kernel)
    from . import helion_record

    return helion_record.name_of(kernel)


class adopting:
    """`with hdispatch.adopting(kernel, …):` adopts kernels for the block; without arguments all of the process.

    What was adopted before stays so.
    """

    def __init__(self, *kernels: Any, driver: Driver = "cuda") -> None:
        self._kernels = kernels
        self._driver = driver
        self._undo: list[Any] = []

    def __enter__(self) -> adopting:
        _check(self._driver)
        with _lock:
            if not self._kernels and _all is None:
                adopt(driver=self._driver)
                self._undo.append(None)
            # All are looked up before the first is adopted: one that is none leaves nothing behind.
            for each in [kernel for given in self._kernels for kernel in _kernels_of(given)]:
                if not _is_adopted(each):
                    _adopt_this(each, self._driver)
                    self._undo.append(each)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for each in self._undo:
            _stop_all() if each is None else _give_back(each)
        self._undo.clear()


# ---- one kernel ----


def _set_up() -> None:
    """Tells C++ whom to ask. Once; imports triton."""
    global _is_set_up
    if _is_set_up:
        return
    from triton.language import constexpr  # type: ignore[import-untyped]
    from triton.runtime.jit import JITFunction  # type: ignore[import-untyped]

    from . import host_program, triton_kernel, triton_state

    def parts(kernel: Any) -> Any:
        return vars(kernel)[triton_kernel.PARTS]

    _C.set_adopted_callbacks(
        process_state=triton_state.process_state,
        kernel_state=lambda kernel: triton_state.kernel_state(parts(kernel)),
        choice=lambda kernel, args, keywords: triton_kernel.choice(parts(kernel), args, keywords),
        learn=lambda kernel, compiled, config: triton_kernel.learn(parts(kernel), compiled, config),
        trace=lambda kernel, function, arguments: host_program.trace(parts(kernel).names, function, arguments),
        constexpr_type=constexpr,
        function_type=JITFunction,
        device_count=torch.cuda.device_count() if torch.cuda.is_available() else 1,
    )
    _is_set_up = True


def _adopt_this(kernel: Any, driver: Driver) -> None:
    if _is_helion(kernel):
        _adopt_helion(kernel, driver)
    else:
        _adopt_one(kernel, driver)
        _lazy.pop(id(kernel), None)


def _adopt_one(kernel: Any, driver: Driver) -> None:
    """Makes a kernel's entry, or switches the one that it has on again."""
    from . import triton_kernel

    _set_up()
    for kernel_class in triton_kernel.CLASSES:
        _C.patch_class(kernel_class, None if _all is None else _adopt_lazily)
    if _switch(kernel, on=True):
        return
    parts = triton_kernel.parts_of(kernel)
    if isinstance(parts, str):  # its calls are counted, and stay Triton's
        nothing: dict[str, Any] = {"parameters": [], "may_lack": False, "heuristics": [], "tuner": None}
        name = triton_kernel.name_of(kernel)
        made = _C.make_adopted(kernel=kernel, name=name, is_null=driver == "null", refusal=parts, **nothing)
    else:
        parts.is_null = driver == "null"
        made = _C.make_adopted(
            kernel=kernel,
            name=triton_kernel.name_of(parts.function),
            parameters=triton_kernel.parameters_of(parts),
            is_null=parts.is_null,
            may_lack=parts.lacks,
            heuristics=parts.heuristics,
            tuner=parts.tuner,
            refusal="",
        )
    vars(kernel)[triton_kernel.PARTS] = parts
    vars(kernel)[triton_kernel.ENTRY] = made


# ---- Helion ----


def _is_helion(given: Any) -> bool:
    """Whether it is a Helion kernel; does not import helion."""
    helion = sys.modules.get("helion")
    return helion is not None and isinstance(given, helion.Kernel)


def _adopt_helion(kernel: Any, driver: Driver) -> None:
    """Makes a Helion kernel's entry, or switches the one that it has on again."""
    import helion

    from . import helion_record, triton_kernel

    global _helion_is_set_up
    _set_up()
    _C.patch_host_class(helion.Kernel)
    if not _helion_is_set_up:
        _C.set_host_callbacks(
            state=helion_record.kernel_state,
            record=lambda kernel, args: helion_record.record(kernel, args, _inner(kernel)),
            choice=helion_record.choice,
            launches=lambda kernel: helion_record.adopt_launches(kernel, _inner(kernel)),
        )
        _helion_is_set_up = True
    if _switch(kernel, on=True):
        helion_record.adopt_launches(kernel, _inner(kernel))
        return
    name = helion_record.name_of(kernel)
    vars(kernel)[triton_kernel.ENTRY] = _C.make_host_kernel(kernel=kernel, name=name, is_null=driver == "null")
    vars(kernel)[triton_kernel.PARTS] = driver


def _inner(kernel: Any) -> Callable[[Any], Any]:
    """Makes the entry of a Triton kernel that a Helion kernel launches."""
    from . import triton_kernel

    driver: Driver = vars(kernel)[triton_kernel.PARTS]

    def make(function: Any) -> Any:
        with _lock:
            _adopt_one(function, driver)
            _lazy.pop(id(function), None)
        return None if isinstance(vars(function)[triton_kernel.PARTS], str) else _entry(function)

    return make


# ---- entries ----


def _entry(kernel: Any) -> Any:
    from . import triton_kernel

    made = vars(kernel).get(triton_kernel.ENTRY)
    if not isinstance(made, (_C.AdoptedKernel, _C.HostKernel)) or not _C.adopted_is_of(made, kernel):
        return None  # of the kernel that this one is a copy of
    return made


def _switch(kernel: Any, *, on: bool) -> bool:
    """Whether there was an entry to switch."""
    made = _entry(kernel)
    if made is not None:
        _C.switch_adopted(made, on)
    return made is not None


def _give_back(kernel: Any) -> None:
    """Switches an entry off, and a Helion kernel's launches with it unless all kernels are adopted."""
    with _lock:
        was_on = _is_adopted(kernel)
        _switch(kernel, on=False)
        if was_on and _is_helion(kernel) and _all is None:
            from . import helion_record

            for function in helion_record.launched_by(kernel):
                _switch(function, on=False)


def _is_adopted(kernel: Any) -> bool:
    made = _entry(kernel)
    return made is not None and _C.adopted_is_on(made)


# ---- all of the process ----


def _start_all(driver: Driver) -> None:
    from . import triton_kernel

    global _all
    _set_up()
    _all = driver
    for kernel_class in triton_kernel.CLASSES:
        _C.patch_class(kernel_class, _adopt_lazily)


def _stop_all() -> None:
    from . import triton_kernel

    global _all
    with _lock:
        _all = None
        for kernel_class in triton_kernel.CLASSES:
            _C.patch_class(kernel_class, None)
        for kernel in list(_lazy.values()):
            _switch(kernel, on=False)
        _lazy.clear()


def _adopt_lazily(kernel: Any) -> None:
    """The first call of a kernel, where all are adopted."""
    with _lock:
        if _all is not None and not _is_adopted(kernel):
            _adopt_one(kernel, _all)
            _lazy[id(kernel)] = kernel


# ---- whose kernels ----


def _kernels_of(given: Any) -> list[Any]:
    """The kernel that is given, or those that an object's code names; behind a wrapper that is Triton's also the one inside."""
    from . import triton_kernel

    if _is_interpreted(given):
        return []  # it runs on the CPU, and nothing is launched
    found = host_code.kernels_named_by(given, _is_kernel)
    if found is None:
        raise HdispatchError(
            f"{given!r} is a {type(given).__name__}; hdispatch.adopt takes a kernel of @triton.jit, @triton.autotune or "
            "@triton.heuristics or @helion.kernel, or Python code that launches some: a function, a method, a "
            "torch.nn.Module, a torch.autograd.Function, a functools.partial, a class, an object that can be called"
        )
    if not found:
        raise HdispatchError(
            f"{_name_of(given)} names no Triton kernel: adopt the kernels themselves, or all with hdispatch.adopt()"
        )
    for each in found:  # it grows
        inner = None if _is_helion(each) else triton_kernel.inner_of(each)
        if inner is not None and all(inner is not other for other in found):
            found.append(inner)
    return found


def _is_kernel(given: Any) -> bool:
    from . import triton_kernel

    return isinstance(given, triton_kernel.CLASSES) or _is_helion(given)


def _is_interpreted(given: Any) -> bool:
    """Whether it is a Triton kernel under TRITON_INTERPRET=1."""
    return type(given).__name__ == "InterpretedFunction" and type(given).__module__.startswith("triton.")


def _name_of(given: Any) -> str:
    named = given if hasattr(given, "__qualname__") else type(given)
    return f"{named.__module__}.{named.__qualname__}"
