"""A Triton kernel, autotuned or with heuristics: its parameters for C++, and what Triton compiled as a row.

All use of Triton's private parts for this is here (checked with Triton 3.6, 3.7, 3.8 and 3.9).

Imports triton: import this module when a kernel of Triton's is there.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from triton.compiler import CompiledKernel  # type: ignore[import-untyped]
from triton.runtime.autotuner import Autotuner, Config, Heuristics  # type: ignore[import-untyped]
from triton.runtime.jit import JITFunction  # type: ignore[import-untyped]

from .. import _C

#: The classes that get attributes of ours.
CLASSES = (JITFunction, Autotuner, Heuristics)

#: Where an adopted kernel lies in its kernel's `__dict__`.
ENTRY = "_hdispatch_adopted"
#: Beside it, its `Parts`.
PARTS = "_hdispatch_parts"

MAX_PARAMETERS = 250
MAX_HEURISTICS = 32


@dataclass
class Layer:
    """Heuristics around a kernel, and what they were when it was adopted."""

    wrapper: Any
    inner: Any
    values: dict[str, Any]
    items: list[tuple[str, Any]]

    def is_same(self) -> bool:
        """Whether nobody has replaced anything of them since."""
        if self.wrapper.fn is not self.inner or self.wrapper.values is not self.values or len(self.values) != len(self.items):
            return False
        return all(
            name == then and value is function
            for (name, value), (then, function) in zip(self.values.items(), self.items, strict=True)
        )


@dataclass
class Parts:
    """What a kernel is made of. `function` is its JITFunction; an autotuner's `keys` name the arguments that it chooses by."""

    function: Any
    tuner: Any = None
    keys: list[str] = field(default_factory=list)
    layers: list[Layer] = field(default_factory=list)
    is_null: bool = False

    @property
    def heuristics(self) -> list[tuple[str, Any]]:
        """All, in the order in which Triton computes them."""
        return [item for layer in self.layers for item in layer.items]

    @cached_property
    def names(self) -> dict[str, int]:
        """The index of each parameter."""
        return {each.name: index for index, each in enumerate(self.function.params)}

    @property
    def lacks(self) -> bool:
        """Whether a configuration gives arguments that calls lack."""
        return self.tuner is not None or any(layer.items for layer in self.layers)


def parts_of(kernel: Any) -> Parts | str:
    """The parts of a kernel, or why its calls stay Triton's (what is inside it may be served all the same)."""
    if isinstance(kernel, JITFunction):
        if type(kernel).run is not JITFunction.run:
            return f"a class of its own kind, {type(kernel).__name__}, with a run of its own"
        return Parts(kernel) if len(kernel.params) <= MAX_PARAMETERS else f"more than {MAX_PARAMETERS} parameters"
    layers: list[Layer] = []
    inner = kernel
    while type(inner) is Heuristics:
        if not isinstance(inner.values, dict):
            return f"heuristics whose values are a {type(inner.values).__name__}"
        layers.append(Layer(inner, inner.fn, inner.values, list(inner.values.items())))
        inner = inner.fn
    if sum(len(each.items) for each in layers) > MAX_HEURISTICS:
        return f"more than {MAX_HEURISTICS} heuristics"
    if isinstance(inner, JITFunction):
        return Parts(inner, layers=layers)
    if type(inner) is not Autotuner:
        return f"a wrapper of its own kind, {type(inner).__name__}"
    if not isinstance(inner.fn, JITFunction):
        return f"{type(inner.fn).__name__} inside an autotuner"
    if type(inner.configs) is not list or not isinstance(inner.cache, dict):
        return (
            f"an autotuner whose configs are a {type(inner.configs).__name__} and whose cache is a {type(inner.cache).__name__}"
        )
    if type(inner.keys) not in (list, tuple):
        return f"an autotuner whose keys are a {type(inner.keys).__name__}"
    if any(config.pre_hook is not None for config in inner.configs):
        return "a configuration with a pre_hook"
    return Parts(inner.fn, inner, list(inner.keys) if len(inner.configs) > 1 else [], layers)


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


class _Choices(dict[Any, Any]):
    """Stands for an autotuner's cache: has a choice for every key, and notes the key that it is asked for."""

    asked: tuple[Any, ...] | None = None

    def __contains__(self, key: Any) -> bool:
        return True

    def __missing__(self, key: Any) -> Any:
        self.asked = key
        return Config({}, num_warps=None, num_stages=None, num_ctas=None)


class _Nothing:
    """Stands for the kernel inside an autotuner."""

    def run(self, *_args: Any, **_keywords: Any) -> None:
        """Launches nothing."""


def choice(parts: Parts, args: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[Any, Any] | None:
    """The key that Triton has for an autotuner's call, and the configuration that is chosen for it now; None without one.

    Triton's own code makes the key. An autotuner with one configuration has no key: (None, the configuration).
    """
    tuner = parts.tuner
    if len(tuner.configs) == 1:
        return None, tuner.configs[0]
    asking = object.__new__(Autotuner)
    choices = _Choices()
    vars(asking).update(vars(tuner), cache=choices, fn=_Nothing())
    _C.call_unpatched_run(asking, *args, **keywords)
    chosen = None if choices.asked is None else tuner.cache.get(choices.asked)
    return None if chosen is None else (choices.asked, chosen)


def _is_of(parts: Parts, compiled: Any, config: Any) -> bool:
    """Whether code was compiled with a configuration: another thread may have replaced it since."""
    for name, value in config.all_kwargs().items():
        if name in parts.names:
            found = compiled.src.constants.get((parts.names[name],), value)  # not compiled in: given for each launch
        else:
            found = getattr(compiled.metadata, name, value)
        # Warp specialization adds warps to those that were asked for.
        is_more = name == "num_warps" and "ttg.total-num-warps" in compiled.asm.get("ttgir", "")
        if not (found is value or found == value or is_more):
            return False
    return True


def learn(parts: Parts, compiled: Any, config: Any) -> str | dict[str, Any]:
    """The row that launches what Triton compiled; or the reason why Triton keeps launching it; "" if that is not known yet.

    `config` is what the autotuner has chosen, None without one.
    """
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
    if config is not None:
        if type(config) is not Config or type(config.kwargs) is not dict:
            return f"configuration of its own kind, {type(config).__name__}"
        if config.pre_hook is not None:
            return "a configuration with a pre_hook"
        if not _is_of(parts, compiled, config):
            return ""
    if compiled.src.fn is not parts.function and compiled.src.fn.cache_key != parts.function.cache_key:
        return "code of another function"  # of one that this one is no copy of
    names = [each.name for each in parts.function.params]
    given = {name for name, _ in parts.heuristics} | set(() if config is None else config.kwargs)
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
