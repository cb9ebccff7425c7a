"""What compiled Triton code depends on beside a call's arguments: knobs, hooks, the function's source, captured globals.

C++ asks once, and again when somebody has written to one of the dicts that come with the answer. All use of Triton's private
parts for this is here (checked with Triton 3.6, 3.7, 3.8 and 3.9).

Imports triton: import this module when a kernel of Triton's is there.
"""

from __future__ import annotations

from typing import Any

from triton import knobs  # type: ignore[import-untyped]
from triton.language import constexpr, dtype  # type: ignore[import-untyped]

from .. import _C
from .triton_kernel import CLASSES, Parts

#: (number, reason, dicts, hooks, globals): as csrc/adopted_kernel.h, WatchedState::set. A negative number: nothing is served.
State = tuple[int, str, list[dict[str, Any]], list[list[Any]], list[tuple[dict[str, Any], str, object, bool]]]

MAX_STATES = 0x7FFF

_NUMBERS: dict[object, int] = {}

#: Types whose values cannot change without an assignment.
_FROZEN = (int, float, bool, str, bytes, complex, type(None), type, dtype)


def number_of(token: object) -> int:
    """A number from 1 for each token, the same for equal ones; -1 for one too many."""
    if token not in _NUMBERS and len(_NUMBERS) >= MAX_STATES:
        return -1
    return _NUMBERS.setdefault(token, len(_NUMBERS) + 1)


def process_state() -> State:
    """What all kernels depend on: the knobs that Triton reads on each launch, the launch hooks, and Triton's classes."""
    runtime, compilation = knobs.runtime, knobs.compilation
    classes = [_C.class_dict(each) for each in CLASSES]
    dicts = [vars(runtime), vars(compilation), *classes]
    if any(type(each.get("run")) is not _C.AdoptedMethod for each in classes):
        return -1, "run was replaced", dicts, [], []
    chains = [runtime.launch_enter_hook, runtime.launch_exit_hook]
    if any(type(chain).__name__ != "HookChain" for chain in chains):
        return -1, "launch hook", dicts, [], []
    if getattr(runtime, "add_stages_inspection_hook", None) is not None:
        return -1, "stages inspection hook", dicts, [], []
    if instrumentation := getattr(compilation, "instrumentation_mode", ""):
        return -1, f"instrumentation {instrumentation!r}", dicts, [], []
    token = ("process", bool(runtime.debug), str(getattr(compilation, "fpsan_homomorphic_casts", "")))
    return _state(token, dicts, [chain.calls for chain in chains], [])


def kernel_state(parts: Parts) -> State:
    """What a kernel depends on, an autotuner apart, which C++ asks itself (csrc/adopted_tuner.h)."""
    function = parts.function
    dicts = [vars(function)]
    for each in parts.layers:
        dicts += [vars(each.wrapper), each.values]
    if any("run" in vars(each) for each in (function, *(layer.wrapper for layer in parts.layers))):
        return -1, "run was replaced", dicts, [], []
    if not all(each.is_same() for each in parts.layers):
        return -1, "heuristics or their kernel replaced", dicts, [], []
    if function.hash is None:  # the first call is yet to come
        return 0, "", dicts, [function.pre_run_hooks], []
    captured = [(scope, name, value, not _is_frozen(value)) for (name, _), (value, scope) in function.used_global_vals.items()]
    token = (id(function), function.hash, bool(function.debug), function.noinline)
    return _state(token, dicts, [function.pre_run_hooks], captured)


def _state(token: object, dicts: list[dict[str, Any]], hooks: list[list[Any]], captured: list[Any]) -> State:
    number = number_of(token)
    return number, "" if number > 0 else "more states than are kept", dicts, hooks, captured


def _is_frozen(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(_is_frozen(item) for item in value)
    if type(value) is constexpr:
        return _is_frozen(value.value)
    return type(value) in _FROZEN
