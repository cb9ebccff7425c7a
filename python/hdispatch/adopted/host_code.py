"""Whose code launches kernels: functions, methods, modules, autograd functions and what wraps them, and what they name.

Nothing is called: names in code objects are looked up where the code would find them.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._library.custom_ops import CustomOpDef

#: What a look-up finds nowhere.
_ABSENT = object()


def kernels_named_by(given: Any, is_kernel: Callable[[Any], bool]) -> list[Any] | None:
    """The kernels that an object's code names, itself and through code of its module; None for what is no code."""
    search = _Search(is_kernel)
    return list(search.found.values()) if search.look(given) else None


class _Search:
    def __init__(self, is_kernel: Callable[[Any], bool]) -> None:
        self._is_kernel = is_kernel
        self.found: dict[int, Any] = {}
        self._seen: dict[tuple[int, int], Any] = {}  # with what is looked into, so that no id is given away

    def look(self, value: Any, within: str | None = None) -> bool:
        """Look into a value, if it is code of the module `within` (None: of any); whether it is code at all."""
        if self._is_kernel(value):
            self.found[id(value)] = value
        elif isinstance(value, functools.partial):
            for each in (value.func, *value.args, *value.keywords.values()):
                self.look(each, within)
        elif isinstance(value, CustomOpDef):
            self.look(value._init_fn, within)
        elif isinstance(value, type):
            self._look_into_class(value, within)
        elif isinstance(value, torch.nn.Module):
            for module in value.modules():
                self.look(module.forward)
        elif isinstance(value, types.MethodType):
            owner = value.__self__
            if isinstance(owner, type) and issubclass(owner, torch.autograd.Function):  # its `apply`
                self._look_into_class(owner, within)
            elif isinstance(function := _unwrapped(value.__func__), types.FunctionType):
                self._look_into(function, owner, within)
        elif isinstance(function := _unwrapped(value), types.FunctionType):
            self._look_into(function, None, within)
        elif isinstance(call := _unwrapped(inspect.getattr_static(type(value), "__call__", None)), types.FunctionType):
            self._look_into(call, value, within)
        else:
            return False
        return True

    def _look_into_class(self, owner: type, within: str | None) -> None:
        if within is not None and owner.__module__ != within:
            return
        for base in owner.__mro__:
            for value in vars(base).values():
                for function in _functions_of(value):
                    self._look_into(function, owner, None)

    def _look_into(self, function: types.FunctionType, owner: Any, within: str | None) -> None:
        key = (id(function), id(owner))
        is_foreign = within is not None and function.__module__ != within
        if is_foreign or key in self._seen or _is_of_others(function.__module__):
            return
        self._seen[key] = (function, owner)
        names = set(_names(function.__code__))
        scope = {**function.__globals__, **_closure(function)}
        values = [scope[name] for name in names if name in scope]
        modules = dict[int, types.ModuleType]()
        for value in values:  # grows: `package.module.kernel` is looked up name by name
            if isinstance(value, types.ModuleType) and id(value) not in modules and not _is_of_others(value.__name__):
                modules[id(value)] = value
                values += [vars(value)[name] for name in names if name in vars(value)]
        values += [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
        for value in values:
            if not isinstance(value, types.ModuleType):
                self.look(value, function.__module__)
        if owner is not None:
            for name in names:
                self._look_at_attribute(owner, name)

    def _look_at_attribute(self, owner: Any, name: str) -> None:
        """What `self.name` is in a method, without calling a property."""
        places = [vars(owner)] if hasattr(owner, "__dict__") and not isinstance(owner, type) else []
        places += [owner._modules] if isinstance(owner, torch.nn.Module) else []
        value = next((place[name] for place in places if name in place), _ABSENT)
        if value is not _ABSENT:
            self.look(value)
            return
        value = inspect.getattr_static(owner if isinstance(owner, type) else type(owner), name, None)
        if self._is_kernel(value):
            self.look(value)
        for function in _functions_of(value):
            self._look_into(function, owner, None)


def _is_of_others(module: str | None) -> bool:
    """Whether a module is of those whose kernels are nobody's to adopt: what all code names."""
    return (module or "").partition(".")[0] in ("torch", "triton")


def _unwrapped(value: Any) -> Any:
    """The function inside wrappers that say what they wrap."""
    return inspect.unwrap(value) if inspect.isfunction(value) or "__wrapped__" in getattr(value, "__dict__", {}) else value


def _functions_of(value: Any) -> list[types.FunctionType]:
    """The Python functions behind a class's attribute: a method, a static or class method, a property."""
    if isinstance(value, (staticmethod, classmethod)):
        found = [_unwrapped(value.__func__)]
    elif isinstance(value, property):
        found = [value.fget, value.fset]
    elif isinstance(value, functools.cached_property):
        found = [value.func]
    else:
        found = [_unwrapped(value)]
    return [each for each in found if isinstance(each, types.FunctionType)]


def _closure(function: types.FunctionType) -> dict[str, Any]:
    """Variables of the functions around it, those that have a value yet."""
    found = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            found[name] = cell.cell_contents
        except ValueError:
            continue
    return found


def _names(code: types.CodeType) -> Iterator[str]:
    yield from (*code.co_names, *code.co_freevars)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)
