"""The drop-in for vLLM: its CUDA ops, `torch.ops._C.<op>`, `_moe_C` and `_C_cache_ops`, served from the launch table.

`override_vllm_ops` puts one C++ kernel over each op's CUDA kernel in torch's dispatcher, so that every caller is served:
eager code, code that Inductor compiled, graph capture, C++. What the table does not serve runs vLLM's own kernel and is
counted in `hdispatch.stats()`. Calls from Python are also spared torch's argument parser. vLLM itself is not imported.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal

import torch

from ... import _C, registry
from ...errors import HdispatchError
from ...opspec import Form


@dataclass(frozen=True)
class Route:
    """An op of ours that serves calls of vLLM's: the same arguments in the same order; the last may be in one of them only.

    namespace  of vLLM's op in torch.ops
    padded, rows  as in `VllmOp`
    """

    op: str
    forms: tuple[Form, ...] = ()
    namespace: str = "_C"
    padded: tuple[str, ...] = ()
    rows: str | None = None


def _routes() -> dict[str, tuple[Route, ...]]:
    found: dict[str, tuple[Route, ...]] = {}
    for name in sorted(registry.names()):
        if (served := registry.spec(name).vllm) is not None:
            route = Route(name, served.forms, served.namespace, served.padded, served.rows)
            found[served.op] = (*found.get(served.op, ()), route)
    return found


#: vLLM's op -> our ops that say so in their declarations, by name; the first one that takes the arguments serves a call.
ROUTES = _routes()


def override_vllm_ops(only: Iterable[str] | None = None) -> Override:
    """Serve vLLM's CUDA ops from the launch table, until `undo` or, as a context manager, the end of the block.

        hdispatch.load("bundle")
        hdispatch.override_vllm_ops()

    only    names of the ops; all of `hdispatch.integrations.vllm.ROUTES` if None.

    vLLM's library may be loaded before or after. An op whose schema is not the expected one stays as it is, with a warning.
    Overrides may nest; an op is vLLM's again after the last `undo`. Other threads may call the ops meanwhile, but, as with
    every registration in torch, not while an op is overridden for the first time in the process. Where something else
    overrides an op after this, calls of `torch.ops._C.<op>` still try the table first; `undo` before that.

    Raises `HdispatchError` for a name that is not in ROUTES.
    """
    names = list(ROUTES) if only is None else list(only)
    unknown = [name for name in names if name not in ROUTES]
    if unknown:
        raise HdispatchError(f"no such ops of vLLM are served: {', '.join(unknown)}; there are {', '.join(sorted(ROUTES))}")
    return Override("CUDA", {name: ROUTES[name] for name in names})


@dataclass
class _Taken:
    """An op that is or was overridden. `users` are the overrides that are on."""

    kernel: _C.Override
    routes: Sequence[Route]
    packet: Any
    former_class: type
    short_class: type  #: `former_class`, but calls go to the table first
    users: int = 0


_LOCK = threading.RLock()
_TAKEN: dict[tuple[str, str, str], _Taken] = {}
_WAITING: dict[str, list[Override]] = {}  # by namespace


class Override:
    """Ops of another library that are served from the table. Make it with `override_vllm_ops`.

    namespace   of all the ops; None: each is where its routes say

    served      names of the ops that are overridden
    waiting     names of those that their library has not defined yet; each is overridden when it is first looked up
    refused     names of ops with an unexpected schema -> what differs
    """

    def __init__(
        self, key: Literal["CUDA", "CPU"], routes: Mapping[str, Sequence[Route]], namespace: str | None = None
    ) -> None:
        self._key, self._routes = key, dict(routes)
        self._namespaces = {name: namespace or served[0].namespace for name, served in routes.items()}
        self.served: list[str] = []
        self.waiting: list[str] = list(routes)
        self.refused: dict[str, str] = {}
        with _LOCK:
            for name in routes:
                self._take(name)
            for waited in {self._namespaces[name] for name in self.waiting}:
                _WAITING.setdefault(waited, []).append(self)
                getattr(torch.ops, waited).__class__ = _WatchedNamespace

    def undo(self) -> None:
        """Let the former kernels serve all calls again. Nothing happens the second time."""
        with _LOCK:
            for name in self.served:
                _release((self._namespaces[name], name, self._key))
            self.served, self.waiting = [], []
            self._stop_waiting()

    def __enter__(self) -> Override:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.undo()

    def __repr__(self) -> str:
        where = " and ".join(f"torch.ops.{namespace}" for namespace in dict.fromkeys(self._namespaces.values()))
        return f"<override of {where}: served {self.served}, waiting {self.waiting}, refused {self.refused}>"

    def _take(self, name: str) -> None:
        """Override an op that waits, if it is there by now."""
        namespace = self._namespaces[name]
        packet = getattr(getattr(torch.ops, namespace), name, None)
        if name not in self.waiting or packet is None:
            return
        routes = self._routes[name]
        differs = next(filter(None, (_difference(packet, route) for route in routes)), None)
        if differs:
            self.waiting.remove(name)
            self.refused[name] = differs
            warnings.warn(f"hdispatch does not override torch.ops.{namespace}.{name}: {differs}", stacklevel=4)
        elif _acquire((namespace, name, self._key), packet, routes):
            self.waiting.remove(name)
            self.served.append(name)

    def _look(self, namespace: str, name: str) -> None:
        with _LOCK:
            if self._namespaces.get(name) == namespace:
                self._take(name)
            self._stop_waiting()

    def _stop_waiting(self) -> None:
        """Stop watching namespaces of which no op is awaited any more."""
        waited = {self._namespaces[name] for name in self.waiting}
        for namespace in set(self._namespaces.values()) - waited:
            others = _WAITING.get(namespace, [])
            if self in others:
                others.remove(self)
                if not others:
                    getattr(torch.ops, namespace).__class__ = torch._ops._OpNamespace


class _WatchedNamespace(torch._ops._OpNamespace):
    """A namespace of torch.ops while ops of it are waited for: their first look-up comes here, those after it do not."""

    __module__ = torch._ops._OpNamespace.__module__

    def __getattr__(self, op_name: str) -> Any:
        packet = super().__getattr__(op_name)  # AttributeError as long as the op is not defined
        for override in list(_WAITING.get(self.name, ())):
            override._look(self.name, op_name)
        return packet


def _acquire(key: tuple[str, str, str], packet: Any, routes: Sequence[Route]) -> bool:
    """Override an op, or share an override that there is. False if the op has no kernel yet."""
    taken = _TAKEN.get(key)
    if taken is None or not (taken.users or _resume(taken, packet, routes)):
        kernel = _make_kernel(key, packet, routes)
        if kernel is None:
            return False
        former = type(packet)
        # The packet stays the object that others hold, and its overloads; only the call takes the shorter way.
        body = {"__call__": kernel.make_door(packet.op), "__doc__": packet.__doc__, "__module__": packet.__module__}
        taken = _TAKEN[key] = _Taken(kernel, routes, packet, former, type(former.__name__, (former,), body))
    taken.users += 1
    if type(packet) is torch._ops.OpOverloadPacket and not _is_wrapped("::".join(key[:2])):
        packet.__class__ = taken.short_class
    return True


def _resume(taken: _Taken, packet: Any, routes: Sequence[Route]) -> bool:
    """Switch on what an earlier override left, if it is what is wanted now and nobody has overridden the op since."""
    return taken.packet is packet and taken.routes == routes and taken.kernel.resume()


def _make_kernel(key: tuple[str, str, str], packet: Any, routes: Sequence[Route]) -> _C.Override | None:
    arguments = packet.default._schema.arguments
    made = []
    for route in routes:
        forms: list[tuple[str, str, str | None]] = [(form.arg, form.form, form.flag) for form in route.forms]
        made.append((registry.get(route.op), forms, route.padded, route.rows))
    return _C.override_op(
        "::".join(key[:2]),
        key[2] == "CUDA",
        made,
        len(arguments),
        sum(not argument.has_default_value() for argument in arguments),
    )


def _is_wrapped(name: str) -> bool:
    """Whether torch's dispatcher has kernels to call before those of the device, which the shorter way would leave out."""
    keys = ("Autograd", "AutogradCUDA", "AutogradCPU", "AutocastCUDA", "AutocastCPU", "ADInplaceOrView", "BackendSelect")
    return any(torch._C._dispatch_has_kernel_for_dispatch_key(name, key) for key in keys)


def _release(key: tuple[str, str, str]) -> None:
    taken = _TAKEN[key]
    taken.users -= 1
    if not taken.users:
        taken.kernel.undo()
        if type(taken.packet) is taken.short_class:
            taken.packet.__class__ = taken.former_class


def _difference(packet: Any, route: Route) -> str | None:
    """How the op's schema differs from what our op can stand for; None if it does not."""
    if packet.overloads() != ["default"]:
        return f"it has the overloads {packet.overloads()}; expected one without a name"
    theirs, ours = packet.default._schema, getattr(torch.ops.hdispatch, route.op).default._schema
    common = min(len(theirs.arguments), len(ours.arguments))
    same = not theirs.returns and all(map(_is_same, theirs.arguments, ours.arguments))
    same = same and all(
        str(argument.type).startswith("Optional") and not argument.kwarg_only for argument in theirs.arguments[common:]
    )
    if same and all(argument.has_default_value() for argument in ours.arguments[common:]):
        return None
    return f"its schema is {theirs}; expected that of {ours}, of which the last arguments may be left out"


def _is_same(theirs: Any, ours: Any) -> bool:
    """The same name, type and mutability; our default where it has one."""

    def facts(argument: Any) -> tuple[object, ...]:
        written = argument.alias_info is not None and argument.alias_info.is_write
        return argument.name, str(argument.type), written, argument.kwarg_only

    if facts(theirs) != facts(ours):
        return False
    return not theirs.has_default_value() or (ours.has_default_value() and theirs.default_value == ours.default_value)
