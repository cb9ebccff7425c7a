"""Runs a host function on a call and returns its one kernel launch: grid and arguments as expressions in the call's sizes.

A host function is Python that a DSL generated or a person wrote: it takes the op's arguments and `_launcher`, and calls
`_launcher(kernel, grid, *args, **options)` once. Here it runs on fake tensors, symbolically to read off the record, or
with a concrete M to check the record.
"""

from __future__ import annotations

import builtins
import functools
import inspect
import math
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import sympy  # type: ignore[import-untyped]
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import BuildError
from ..opspec import TensorArg
from .call_maker import FLOAT_HINT, Call
from .expr import Value, at
from .host_launch import Constant, Descriptor, Flag, HostArg, Launch, Number, Pointer, Real


@dataclass(frozen=True)
class Trace:
    """A launch and what was assumed about the sizes while it was traced.

    leaves      the symbols in both, by their names in the manifest
    multiples   what generic sizes and strides are taken to be multiples of; a guard tests it where it matters
    """

    launch: Launch
    guards: tuple[sympy.Basic, ...]
    leaves: dict[sympy.Symbol, str]
    multiples: dict[sympy.Symbol, int]

    def symbol(self, leaf: str) -> sympy.Symbol:
        """The symbol of a leaf, e.g. "M"."""
        return next(symbol for symbol, name in self.leaves.items() if name == leaf)


@dataclass(frozen=True)
class HostSide:
    """A kernel with a config, ready to trace.

    host         takes the op's arguments and `_launcher`
    agrees       whether the code is valid for M = m, rows `row_padding` elements longer than their width, and other sizes, as
                 the DSL sees it
    index_bits   width of the kernel's offsets; with 32 no tensor may have 2**31 elements
    turns        Ms at which the code might cease to be valid, as far as the DSL can tell; `agrees` is asked there
    early        tensor arguments that the code may read before it waits for the kernel before it
    """

    host: Callable[..., object]
    agrees: Callable[[int, int, Mapping[str, int]], bool]
    index_bits: Literal[32, 64]
    turns: frozenset[int]
    early: tuple[str, ...] = ()


def trace(host: Callable[..., object], call: Call) -> Trace:
    """Runs the host function on the call and returns its launch.

    BuildError, naming the construct, for anything but views, TMA descriptors and exactly one launch: tensor operations,
    allocations, stateful launch options, values that are not integers, floats of the call or constants.
    """
    launches: list[Launch] = []
    allocated = _Allocated()
    recorder = _Recorder(call, launches, allocated)
    with _host_globals(host), call.mode, _OnlyViews(call, allocated):
        result = host(*call.args, _launcher=recorder)
    if len(launches) != 1:
        names = [launch.kernel.__name__ for launch in launches]
        raise BuildError(f"the host function launches {len(launches)} kernels {names}; a record holds exactly one")
    guards = tuple(guard.expr for guard in call.env.guards) if call.env is not None else ()
    launch = _with_outputs(launches[0], allocated.names(call, result))
    return Trace(launch, guards, call.leaves, call.multiples | _guarded_multiples(guards))


def _guarded_multiples(guards: Sequence[sympy.Basic]) -> dict[sympy.Symbol, int]:
    """The multiples that the host function checks by a branch: `if x.stride(0) % 16: raise …`."""
    found: dict[sympy.Symbol, int] = {}
    for guard in guards:
        if not isinstance(guard, sympy.Equality) or guard.args[1] != 0 or len(guard.args[0].args) != 2:
            continue
        symbol, by = guard.args[0].args
        if type(guard.args[0]).__name__ in ("Mod", "PythonMod") and isinstance(symbol, sympy.Symbol) and by.is_Integer:
            found[symbol] = math.lcm(found.get(symbol, 1), int(by))
    return found


class _Allocated:
    """The tensors that a host function allocates. A launch knows them by a name of their own until they are returned."""

    def __init__(self) -> None:
        self.made: list[tuple[torch.Tensor, str, bool]] = []  # kept, so that no other has its storage; name, whether zero

    def add(self, tensor: torch.Tensor, zeroed: bool) -> None:
        """Give a tensor a name."""
        self.made.append((tensor, f"allocation {len(self.made)}", zeroed))

    def find(self, storage: int) -> tuple[str, torch.Tensor] | None:
        """The name of what has a storage."""
        return next(((name, made) for made, name, _ in self.made if made.untyped_storage()._cdata == storage), None)

    def names(self, call: Call, result: object) -> dict[str, str]:
        """Names of allocations -> the op's arguments. BuildError unless what is returned is what the op returns."""
        if not call.outputs:
            return {}
        found = result if isinstance(result, (tuple, list)) else (result,)
        if len(found) != len(call.outputs) or not all(isinstance(each, torch.Tensor) for each in found):
            shown = ["Tensor" if isinstance(each, torch.Tensor) else type(each).__name__ for each in found]
            raise BuildError(f"the host function returns {shown}; the op returns {[arg.name for arg, _ in call.outputs]}")
        return {self._name(each, arg, wanted): arg.name for each, (arg, wanted) in zip(found, call.outputs, strict=True)}

    def _name(self, tensor: torch.Tensor, arg: TensorArg, wanted: torch.Tensor) -> str:
        storage = tensor.untyped_storage()._cdata
        own = next((each for each in self.made if each[0].untyped_storage()._cdata == storage), None)
        if own is None:
            raise BuildError(f"the host function returns {arg.name}, which it does not allocate; the op does: returned=True")
        whole, name, zeroed = own
        if zeroed != arg.zeroed:
            said = "zeros" if zeroed else "no zeros"
            raise BuildError(f"the host function allocates {arg.name} with {said}; the op says zeroed={arg.zeroed}")
        for each in (tensor, whole):
            if problem := _difference(each, wanted):
                raise BuildError(f"the host function returns {arg.name} {problem}")
        return name


def _difference(tensor: torch.Tensor, wanted: torch.Tensor) -> str | None:
    """How a tensor is not what an op declares; of symbolic sizes concrete calls tell."""
    if tensor.dtype != wanted.dtype:
        return f"of {tensor.dtype}; the op declares {wanted.dtype}"
    if tensor.dim() != wanted.dim():
        return f"of rank {tensor.dim()}; the op declares {wanted.dim()}"
    for what, found, declared in (("sizes", tensor.shape, wanted.shape), ("strides", tensor.stride(), wanted.stride())):
        known = [(a, b) for a, b in zip(found, declared, strict=True) if isinstance(a, int) and isinstance(b, int)]
        if any(a != b for a, b in known) and (what == "sizes" or 0 not in tensor.shape):
            return f"with the {what} {tuple(found)}; the op declares {tuple(declared)}"
    return None


def _with_outputs(launch: Launch, names: Mapping[str, str]) -> Launch:
    """The launch with what the op returns by its names. BuildError for another allocation."""

    def named(arg: HostArg) -> HostArg:
        if not isinstance(arg, (Pointer, Descriptor)) or not arg.arg.startswith("allocation "):
            return arg
        if arg.arg not in names:
            raise BuildError(
                "the host function allocates a tensor for the kernel that it does not return; memory of the runtime's is a "
                "workspace: OpSpec(workspace=WorkspaceArg(…))"
            )
        return replace(arg, arg=names[arg.arg])

    return replace(launch, args={name: named(arg) for name, arg in launch.args.items()})


@functools.lru_cache(maxsize=256)
def _signature(function: Callable[..., object]) -> inspect.Signature:
    return inspect.signature(function)


class _Recorder:
    """The `_launcher` that a host function gets: notes the launch down."""

    def __init__(self, call: Call, launches: list[Launch], allocated: _Allocated) -> None:
        self.call = call
        self.allocated = allocated
        self.launches = launches
        self.storages = {tensor.untyped_storage()._cdata: (name, tensor) for name, tensor in call.tensors()}

    def __call__(self, kernel: Any, grid: Any, /, *args: object, **kwargs: object) -> None:
        if not hasattr(kernel, "params") or not hasattr(kernel, "fn"):
            raise BuildError(
                f"the host function launches a {type(kernel).__name__}; "
                "it takes a plain @triton.jit function, whose options the config gives"
            )
        stateful = sorted(name for name in kwargs if name.startswith("_"))
        if stateful:
            raise BuildError(
                f"{kernel.__name__} is launched with {', '.join(stateful)}: "
                "state kept between launches cannot be part of a record"
            )
        own = [param.name for param in kernel.params]
        bound = _signature(kernel.fn).bind(*args, **{name: kwargs.pop(name) for name in own if name in kwargs})
        bound.apply_defaults()
        fixed = {param.name for param in kernel.params if getattr(param, "is_constexpr", False)}
        described = {name: self.describe(name, bound.arguments[name], name in fixed) for name in own}
        self.launches.append(Launch(kernel, self.grid(grid), described, kwargs))

    def grid(self, grid: Any) -> tuple[Value, Value, Value]:
        if callable(grid) or not isinstance(grid, (tuple, list)) or not 1 <= len(grid) <= 3:
            shown = grid if isinstance(grid, (tuple, list)) else f"a {type(grid).__name__}"
            raise BuildError(f"the launch grid is {shown}; it takes a tuple of 1 to 3 integers")
        sizes = [self.describe(f"grid dimension {axis}", size) for axis, size in enumerate(grid)]
        for axis, size in enumerate(sizes):
            if not isinstance(size, Number):
                raise BuildError(f"grid dimension {axis} is {grid[axis]!r}; it takes an integer")
        x, y, z = [size.value for size in sizes if isinstance(size, Number)] + [1] * (3 - len(sizes))
        return x, y, z

    def describe(self, name: str, value: object, is_constexpr: bool = False) -> HostArg:
        if is_constexpr and isinstance(value, (tuple, list)) and _is_plain(value):
            return Constant(_tupled(value))
        if isinstance(value, torch.Tensor):
            return self.pointer(name, value)
        if isinstance(value, bool):
            return Flag(int(value))
        if isinstance(value, torch.SymBool):
            return Flag(_expression(value))
        if isinstance(value, int):
            return Number(value)
        if isinstance(value, torch.SymInt):
            return Number(_expression(value))
        if isinstance(value, float):
            return Real(None, value)
        if isinstance(value, torch.SymFloat):
            return self.real(name, value)
        if type(value).__name__ == "TensorDescriptor":
            return self.descriptor(name, value)
        if isinstance(value, (tuple, list, dict)):
            raise BuildError(
                f"launch argument {name} is a {type(value).__name__}; pass its elements one by one, or, if they are constants, "
                "as a tl.constexpr"
            )
        return Constant(value)

    def pointer(self, name: str, tensor: torch.Tensor) -> Pointer:
        storage = tensor.untyped_storage()._cdata
        known = self.storages.get(storage) or self.allocated.find(storage)
        if known is None:
            raise BuildError(f"launch argument {name} is a tensor that is no argument of the op and no view of one")
        arg, base = known
        offset = (tensor.storage_offset() - base.storage_offset()) * tensor.element_size()
        return Pointer(arg, offset.node.expr if isinstance(offset, torch.SymInt) else offset, tensor.dtype)

    def descriptor(self, name: str, value: Any) -> Descriptor:
        """Triton's TensorDescriptor, or what stands for it."""
        if hasattr(value, "layout"):
            raise BuildError(f"launch argument {name} is a descriptor of Gluon's; a record takes Triton's TensorDescriptor")
        base = self.pointer(name, value.base)
        shape, strides = (
            tuple(_expression(item) if isinstance(item, torch.SymInt) else int(item) for item in listed)
            for listed in (value.shape, value.strides)
        )
        block = tuple(value.block_shape)
        problem = _descriptor_problem(shape, strides, block)
        if problem:
            raise BuildError(f"launch argument {name} is a TMA descriptor {problem}")
        fill_nan, tf32 = value.padding == "nan", bool(getattr(value, "round_f32_to_tf32", False))
        return Descriptor(base.arg, base.offset, base.dtype, shape, strides, block, fill_nan, tf32)

    def real(self, name: str, value: torch.SymFloat) -> Real:
        expression = value.node.expr
        if expression not in self.call.floats:
            raise BuildError(
                f"launch argument {name} is computed on the host, {value}; pass the argument itself and compute in the kernel"
            )
        return Real(self.call.floats[expression], FLOAT_HINT)


def _tupled(value: object) -> object:
    """Triton takes tuples."""
    return tuple(_tupled(each) for each in value) if isinstance(value, (tuple, list)) else value


def _is_plain(value: object) -> bool:
    """Whether a list of such is a constant."""
    if isinstance(value, (tuple, list)):
        return all(_is_plain(each) for each in value)
    return value is None or type(value) in (bool, int, float, str) or hasattr(value, "cache_key")


def _expression(value: torch.SymInt | torch.SymBool) -> Value:
    return at(value.node.expr, {})


def _descriptor_problem(shape: Sequence[Value], strides: Sequence[Value], block: Sequence[object]) -> str | None:
    """Why these cannot be a TMA descriptor, whatever the call; None if they may. The launcher tests what a call decides."""
    if not len(shape) == len(strides) == len(block) or not 1 <= len(shape) <= 5:
        return f"of {len(shape)} sizes, {len(strides)} strides and {len(block)} block sizes; it takes 1 to 5, as many of each"
    if not all(isinstance(size, int) for size in block):
        return f"with the block {list(block)}, which is not known when it is built; block sizes come from the config"
    if strides[-1] != 1:
        return f"whose last stride is {strides[-1]}; it takes 1: transpose the tensor"
    return None


#: What allocates, and what fills with zeros then, by the beginnings of their names.
_EMPTY = ("aten.empty", "aten.new_empty")
_ZEROS = ("aten.zeros", "aten.new_zeros")


class _OnlyViews(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses every tensor operation of a host function that is not a view, by its name; and allocations of others' results."""

    def __init__(self, call: Call, allocated: _Allocated) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.call = call
        self.allocated = allocated

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if name.startswith((*_EMPTY, *_ZEROS)):
            return self._allocate(name, func, args, kwargs or {})
        if not (getattr(func, "is_view", False) or func.namespace == "prim" or name.startswith("aten.sym_")):
            raise BuildError(
                f"the host function runs {name}; only views and one kernel launch can become a record: do it in the kernel"
            )
        return func(*args, **(kwargs or {}))

    def _allocate(self, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> torch.Tensor:
        if not self.call.outputs:
            raise BuildError(
                f"the host function allocates ({name}); an op that returns what it allocates declares it: "
                "TensorArg(…, mutated=True, returned=True). Else the kernel takes its results as arguments"
            )
        if self.call.env is not None and "_like" in name and isinstance(args[0], torch.Tensor):
            # Whether a tensor of free strides is dense would become a guard; it is contiguous, and concrete calls see to that.
            dtype = kwargs.get("dtype") or args[0].dtype
            made = torch.empty(args[0].shape, dtype=dtype, device=args[0].device)
        else:
            made = func(*args, **kwargs)
        self.allocated.add(made, name.startswith(_ZEROS))
        return made


@contextmanager
def _host_globals(host: Callable[..., object]) -> Iterator[None]:
    """While the host function runs, `min` and `max` stay symbolic, and TMA descriptors keep what they are made of."""
    symbolic = {"min": _symbolic(builtins.min, torch.sym_min), "max": _symbolic(builtins.max, torch.sym_max)}
    saved: list[tuple[dict[str, Any], dict[str, object], set[str]]] = []
    for scope in _scopes(_function(host)):
        descriptors = [name for name, value in scope.items() if getattr(value, "__name__", "") == "TensorDescriptor"]
        swapped: dict[str, object] = {**symbolic, **dict.fromkeys(descriptors, TensorDescriptor)}
        saved.append((scope, {name: scope[name] for name in swapped if name in scope}, set(swapped)))
        scope.update(swapped)
    try:
        yield
    finally:
        for scope, former, names in saved:
            for name in names:
                del scope[name]
            scope.update(former)


@functools.lru_cache(maxsize=64)  # a build traces the same host functions at many sizes
def _scopes(host: types.FunctionType) -> list[dict[str, Any]]:
    """The globals of a host function's module, and of those modules that it takes from beside its package: `..lib`, say."""
    own = host.__globals__
    parts = str(own.get("__name__", "")).split(".")
    beside = ".".join(parts[:-2]) + "."
    found, todo = {id(own): own}, [own] if len(parts) > 2 else []
    while todo:
        for value in list(todo.pop().values()):
            module = value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", None)
            if isinstance(module, str) and module.startswith(beside) and module in sys.modules:
                scope = vars(sys.modules[module])
                if id(scope) not in found:
                    found[id(scope)] = scope
                    todo.append(scope)
    return list(found.values())


@dataclass(frozen=True)
class TensorDescriptor:
    """Stands for Triton's, which would decide between symbolic integers."""

    base: torch.Tensor
    shape: Sequence[Any]
    strides: Sequence[Any]
    block_shape: Sequence[Any]
    padding: str = "zero"
    round_f32_to_tf32: bool = False

    @staticmethod
    def from_tensor(
        tensor: torch.Tensor, block_shape: Sequence[Any], padding: str = "zero", round_f32_to_tf32: bool = False
    ) -> TensorDescriptor:
        """A descriptor of a whole tensor."""
        return TensorDescriptor(tensor, tensor.shape, tensor.stride(), block_shape, padding, round_f32_to_tf32)


def _function(host: Callable[..., object]) -> types.FunctionType:
    function = inspect.unwrap(host)
    if not isinstance(function, types.FunctionType):
        raise BuildError(f"the host side is a {type(host).__name__}; it takes a Python function")
    return function


def _symbolic(plain: Callable[..., Any], pairwise: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    """`min` or `max` that does not decide between symbolic integers."""

    def choose(*args: Any, **kwargs: Any) -> Any:
        values = list(args[0]) if len(args) == 1 else list(args)
        if kwargs or not any(isinstance(value, torch.SymInt) for value in values):
            return plain(*args, **kwargs)
        chosen = values[0]
        for value in values[1:]:
            chosen = pairwise(chosen, value)
        return chosen

    return choose
