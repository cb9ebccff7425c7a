"""A Triton kernel, autotuned or with heuristics: its parameters for C++, and what Triton compiled as a row.

All use of Triton's private parts for this is here (checked with Triton 3.6 and 3.7).

Imports triton: import this module when a kernel of Triton's is there.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from triton.compiler import CompiledKernel  # type: ignore[import-untyped]
from triton.runtime.autotuner import Autotuner, Heuristics  # type: ignore[import-untyped]
from triton.runtime.jit import JITFunction  # type: ignore[import-untyped]

#: The classes that get attributes of ours.
CLASSES = (JITFunction, Autotuner, Heuristics)

#: Where an adopted kernel lies in its kernel's `__dict__`.
ENTRY = "_hdispatch_adopted"
#: Beside it, its `Parts`.
PARTS = "_hdispatch_parts"

MAX_PARAMETERS = 250
MAX_HEURISTICS = 32


@dataclass
class Parts:
    """What a kernel is made of. `function` is its JITFunction; an autotuner's `keys` name the arguments that it chooses by."""

    function: Any
    tuner: Any = None
    keys: list[str] = field(default_factory=list)
    heuristics: list[tuple[str, Any]] = field(default_factory=list)
    is_null: bool = False

    @cached_property
    def names(self) -> dict[str, int]:
        """The index of each parameter."""
        return {each.name: index for index, each in enumerate(self.function.params)}

    @property
    def lacks(self) -> bool:
        """Whether a configuration gives arguments that calls lack."""
        return self.tuner is not None or bool(self.heuristics)


def parts_of(kernel: Any) -> Parts | str:
    """The parts of a kernel, or why its calls stay Triton's (what is inside it may be served all the same)."""
    if isinstance(kernel, JITFunction):
        if type(kernel).run is not JITFunction.run:
            return f"a class of its own kind, {type(kernel).__name__}, with a run of its own"
        return Parts(kernel) if len(kernel.params) <= MAX_PARAMETERS else f"more than {MAX_PARAMETERS} parameters"
    heuristics: list[tuple[str, Any]] = []
    inner = kernel
    while type(inner) is Heuristics:
        heuristics += inner.values.items()
        inner = inner.fn
    if len(heuristics) > MAX_HEURISTICS:
        return f"more than {MAX_HEURISTICS} heuristics"
    if isinstance(inner, JITFunction):
        return Parts(inner, heuristics=heuristics)
    if type(inner) is not Autotuner:
        return f"a wrapper of its own kind, {type(inner).__name__}"
    if not isinstance(inner.fn, JITFunction):
        return f"{type(inner.fn).__name__} inside an autotuner"
    if type(inner.configs) is not list or not isinstance(inner.cache, dict):
        return (
            f"an autotuner whose configs are a {type(inner.configs).__name__} and whose cache is a {type(inner.cache).__name__}"
        )
    if any(config.pre_hook is not None for config in inner.configs):
        return "a configuration with a pre_hook"
    return Parts(inner.fn, inner, list(inner.keys) if len(inner.configs) > 1 else [], heuristics)


def parameters_of(parts: Parts) -> list[tuple[str, bool, object, bool, bool, bool, bool]]:
    """(name, has default, default, is_constexpr, specialize, align, is_exact) of each, as csrc/adopted_door.cpp takes them."""
    found = []
    for each in parts.function.params:
        typed = each.annotation_type
        # Triton does not specialize on values that are declared to be floats or bools.
        specialize = not each.do_not_specialize and not (typed == "u1" or typed[:2] in ("fp", "bf"))
        align = not each.do_not_specialize_on_alignment
        default = each.default if each.has_default else None
        exact = each.name in parts.keys
        found.append((each.name, each.has_default, default, bool(each.is_constexpr), specialize, align, exact))
    return found


def learn(parts: Parts, compiled: Any) -> str | dict[str, Any]:
    """The row that launches what Triton compiled; or the reason why Triton keeps launching it; "" if that is not known yet."""
    if type(compiled) is not CompiledKernel:
        return "" if "Future" in type(compiled).__name__ else f"result of type {type(compiled).__name__}"
    metadata = compiled.metadata
    if metadata.target.backend != "cuda":
        return f"backend {metadata.target.backend}"
    for scratch in ("global_scratch_size", "profile_scratch_size"):
        if getattr(metadata, scratch, 0):
            return scratch.replace("_", " ").removesuffix(" size")
    if getattr(metadata, "tensordesc_meta", None):
        return "tensor descriptor"
    if compiled.src.fn is not parts.function and compiled.src.fn.cache_key != parts.function.cache_key:
        return "code of another function"  # of one that this one is no copy of
    names = [each.name for each in parts.function.params]
    given = {name for name, _ in parts.heuristics} | set(getattr(getattr(parts.tuner, "best_config", None), "kwargs", ()))
    params, behind = [], len(names)  # items of tuples have their values behind those of parameters, in order
    for name, kind in compiled.src.signature.items():
        if isinstance(kind, str):
            each = [(names.index(name), kind)]
        elif name in given:
            return "tuple that a configuration or a heuristic gives"  # the call has no items of it
        elif all(isinstance(item, str) for item in kind):
            each = list(enumerate(kind, behind))
            behind += len(kind)
        else:
            return "tuple in a tuple"
        params += [(index, item) for index, item in each if item != "constexpr"]
    constants = {names[path[0]]: value for path, value in compiled.src.constants.items() if len(path) == 1}
    config = None if parts.tuner is None else parts.tuner.best_config
    return {
        "function": 0 if parts.is_null else int(compiled.function),
        "num_warps": metadata.num_warps,
        "shared_bytes": metadata.shared,
        "cluster": metadata.num_ctas,
        "cooperative": bool(metadata.launch_cooperative_grid),
        "pdl": bool(metadata.launch_pdl),
        "releases": "griddepcontrol.launch_dependents" in compiled.asm.get("ptx", ""),
        "params": params,
        "constants": {**_defaults(parts), **constants},
        **({} if config is None else {"config": config}),
    }


def _defaults(parts: Parts) -> dict[str, object]:
    """What a callable grid sees of arguments that were left out."""
    return {each.name: each.default for each in parts.function.params if each.default is not inspect.Parameter.empty}


def name_of(kernel: Any) -> str:
    """`module.qualname` of the Python function behind a kernel, within whatever wraps it."""
    function = kernel
    while isinstance(function, CLASSES):
        function = function.fn
    return f"{function.__module__}.{getattr(function, '__qualname__', type(function).__qualname__)}"


def inner_of(kernel: Any) -> Any:
    """The kernel inside a wrapper whose own calls stay Triton's; None where there is none."""
    inner = getattr(kernel, "fn", None)
    return inner if isinstance(inner, CLASSES) and isinstance(parts_of(kernel), str) else None
