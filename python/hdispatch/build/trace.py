"""What a host function does on a call: its one kernel launch, with grid and arguments as expressions in the call's sizes.

A host function is Python that a DSL generated or a person wrote: it takes the op's arguments and `_launcher`, and calls
`_launcher(kernel, grid, *args, **options)` once. Here it runs on fake tensors, symbolically to read off the record, or
with a concrete M to hold the record against.
"""

from __future__ import annotations

import builtins
import inspect
import math
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import sympy  # type: ignore[import-untyped]
import torch
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import BuildError
from ..opspec import FloatArg, OpSpec, TensorArg, Variant
from .expr import Value, at

#: Triton compiles different code for integers that are multiples of this, and for addresses that are.
ALIGNMENT = 16

#: A row stride is its width plus this many elements, where nothing else is asked for: then it is like no size.
ROW_PADDING = ALIGNMENT

#: Floats have this value where one is needed; which one does not matter.
FLOAT_HINT = 0.625


@dataclass(frozen=True)
class Pointer:
    """A tensor argument's data pointer plus `offset` bytes."""

    arg: str
    offset: Value
    dtype: torch.dtype


@dataclass(frozen=True)
class Number:
    """An integer, known or not."""

    value: Value


@dataclass(frozen=True)
class Flag:
    """A bool, known or not."""

    value: Value


@dataclass(frozen=True)
class Real:
    """A float: that argument of the op, or the constant `value` where `arg` is None."""

    arg: str | None
    value: float


@dataclass(frozen=True)
class Constant:
    """None, a string, a dtype, …: something that no kernel takes at run time."""

    value: object


HostArg = Pointer | Number | Flag | Real | Constant


@dataclass(frozen=True)
class Launch:
    """One launch. `kernel` is a triton.JITFunction; args by its parameters' names, in their order; the grid has 3 entries."""

    kernel: Any
    grid: tuple[Value, Value, Value]
    args: dict[str, HostArg]
    options: dict[str, object]

    def at(self, values: Mapping[sympy.Symbol, int]) -> Launch:
        """This launch with symbols replaced by values."""

        def replace(arg: HostArg) -> HostArg:
            if isinstance(arg, Pointer):
                return Pointer(arg.arg, at(arg.offset, values), arg.dtype)
            if isinstance(arg, (Number, Flag)):
                return type(arg)(at(arg.value, values))
            return arg

        x, y, z = (at(size, values) for size in self.grid)
        return Launch(self.kernel, (x, y, z), {name: replace(arg) for name, arg in self.args.items()}, self.options)


@dataclass(frozen=True)
class Trace:
    """A launch and what was assumed about the sizes while it was traced.

    leaves      the symbols in both, by their names in the manifest
    multiples   what row strides are taken to be multiples of; a guard tests it where it matters
    """

    launch: Launch
    guards: tuple[sympy.Basic, ...]
    leaves: dict[sympy.Symbol, str]
    multiples: dict[sympy.Symbol, int]

    def symbol(self, leaf: str) -> sympy.Symbol:
        """The symbol of a leaf, e.g. "M"."""
        return next(symbol for symbol, name in self.leaves.items() if name == leaf)


@dataclass
class Call:
    """A call of an op on fake tensors: arguments in the op's order, None where an optional one is absent."""

    names: tuple[str, ...]
    args: tuple[object, ...]
    mode: FakeTensorMode
    env: ShapeEnv | None = None
    leaves: dict[sympy.Symbol, str] = field(default_factory=dict)
    multiples: dict[sympy.Symbol, int] = field(default_factory=dict)
    floats: dict[sympy.Symbol, str] = field(default_factory=dict)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensor arguments that are present."""
        for name, arg in zip(self.names, self.args, strict=True):
            if isinstance(arg, torch.Tensor):
                yield name, arg


@dataclass(frozen=True)
class CallMaker:
    """Makes calls of one variant and shape of an op: everything but M, the row strides and the floats is known."""

    spec: OpSpec
    variant: Variant
    shape: Mapping[str, int]

    def symbolic(self, hint: int, *, floats: bool = True) -> Call:
        """A call with symbolic M, row strides and, if asked for, floats; M is thought of as `hint` (at least 2).

        A hint of 1 would merge M with every size that is 1.
        """
        env = ShapeEnv(duck_shape=False, specialize_zero_one=False)
        call = Call(self._names(), (), FakeTensorMode(shape_env=env), env)

        def size(name: str, value: int) -> Any:
            source = ConstantSource(name)
            symbol = env.create_symbol(value, source, dynamic_dim=DimDynamic.DYNAMIC)
            call.leaves[symbol] = name
            return env.create_symintnode(symbol, hint=value, source=source)

        def row_stride(arg: TensorArg, width: int) -> Any:
            stride = size(f"{arg.name}.stride(0)", width + ROW_PADDING)
            # Rows that are contiguous must not fail the guard.
            call.multiples[stride.node.expr] = ALIGNMENT if width % ALIGNMENT == 0 else 1
            return stride

        def real(name: str) -> Any:
            if not floats:
                return FLOAT_HINT
            source = ConstantSource(name)
            symbol = env.create_unspecified_symbol(FLOAT_HINT, source, dynamic_dim=DimDynamic.DYNAMIC)
            call.floats[symbol] = name
            return env.create_symfloatnode(symbol, hint=FLOAT_HINT, source=source)

        call.args = self._args(call.mode, size("M", hint), row_stride, real)
        return call

    def concrete(self, m: int, row_padding: int = ROW_PADDING) -> Call:
        """A call with everything known; row strides are the width plus `row_padding` elements."""
        mode = FakeTensorMode()
        args = self._args(mode, m, lambda _arg, width: width + row_padding, lambda _name: FLOAT_HINT)
        return Call(self._names(), args, mode)

    def row_strides(self, row_padding: int = ROW_PADDING) -> dict[str, int]:
        """The value of each `<arg>.stride(0)` in `concrete` calls."""
        return {f"{arg.name}.stride(0)": self.width(arg) + row_padding for arg in self.row_strided()}

    def row_strided(self) -> list[TensorArg]:
        """The present arguments whose row stride is free."""
        return [arg for arg in self.spec.tensors() if arg.row_strided and arg.name not in self.variant.none]

    def width(self, arg: TensorArg) -> int:
        """Elements in one row (all dimensions but the first)."""
        return math.prod(self.spec.tensor_sizes(arg, {**self.shape, "M": 1})[1:])

    def rows(self, arg: TensorArg, m: Any) -> Any:
        """The size of the first dimension for M = m."""
        return self.spec.tensor_sizes(arg, {**self.shape, "M": m})[0]

    def elements(self, m: int) -> int:
        """Elements of the largest tensor for M = m."""
        sizes = {**self.shape, "M": m}
        present = [arg for arg in self.spec.tensors() if arg.name not in self.variant.none]
        return max(math.prod(self.spec.tensor_sizes(arg, sizes)) for arg in present)

    def _names(self) -> tuple[str, ...]:
        return tuple(arg.name for arg in self.spec.args)

    def _args(
        self, mode: FakeTensorMode, m: Any, row_stride: Callable[[TensorArg, int], Any], real: Callable[[str], Any]
    ) -> tuple[object, ...]:
        return tuple(
            real(arg.name)
            if isinstance(arg, FloatArg)
            else None
            if arg.name in self.variant.none
            else self._tensor(mode, arg, m, row_stride)
            for arg in self.spec.args
        )

    def _tensor(
        self, mode: FakeTensorMode, arg: TensorArg, m: Any, row_stride: Callable[[TensorArg, int], Any]
    ) -> torch.Tensor:
        sizes: list[Any] = self.spec.tensor_sizes(arg, {**self.shape, "M": m})
        strides: list[Any] = [1] * len(sizes)
        for index in reversed(range(len(sizes) - 1)):
            strides[index] = strides[index + 1] * sizes[index + 1]
        if arg.row_strided:
            strides[0] = row_stride(arg, self.width(arg))
        with mode:
            return torch.empty_strided(sizes, strides, dtype=self.variant.dtypes[arg.name], device="cuda")


@dataclass(frozen=True)
class HostSide:
    """A kernel with a config, ready to trace.

    host         takes the op's arguments and `_launcher`
    agrees       whether the code is valid for M = m and rows `row_padding` elements longer than their width, as the DSL sees it
    index_bits   width of the kernel's offsets; with 32 no tensor may have 2**31 elements
    turns        Ms at which the code might cease to be valid, as far as the DSL can tell; `agrees` is asked there
    """

    host: Callable[..., object]
    agrees: Callable[[int, int], bool]
    index_bits: Literal[32, 64]
    turns: frozenset[int]


def trace(host: Callable[..., object], call: Call) -> Trace:
    """Runs the host function on the call and returns its launch.

    BuildError, naming the construct, for anything but views and exactly one launch: tensor operations, allocations, TMA
    descriptors, stateful launch options, values that are not integers, floats of the call or constants.
    """
    launches: list[Launch] = []
    recorder = _Recorder(call, launches)
    with _host_globals(host), call.mode, _OnlyViews():  # type: ignore[no-untyped-call]
        host(*call.args, _launcher=recorder)
    if len(launches) != 1:
        names = [launch.kernel.__name__ for launch in launches]
        raise BuildError(f"the host function launches {len(launches)} kernels {names}; a record holds exactly one")
    guards = tuple(guard.expr for guard in call.env.guards) if call.env is not None else ()
    return Trace(launches[0], guards, call.leaves, call.multiples)


class _Recorder:
    """The `_launcher` that a host function gets: notes the launch down."""

    def __init__(self, call: Call, launches: list[Launch]) -> None:
        self.call = call
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
        bound = inspect.signature(kernel.fn).bind(*args, **{name: kwargs.pop(name) for name in own if name in kwargs})
        bound.apply_defaults()
        described = {name: self.describe(name, bound.arguments[name]) for name in own}
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

    def describe(self, name: str, value: object) -> HostArg:
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
        if isinstance(value, (tuple, list, dict)):
            raise BuildError(f"launch argument {name} is a {type(value).__name__}; pass its elements one by one")
        return Constant(value)

    def pointer(self, name: str, tensor: torch.Tensor) -> Pointer:
        known = self.storages.get(tensor.untyped_storage()._cdata)
        if known is None:
            raise BuildError(f"launch argument {name} is a tensor that is no argument of the op and no view of one")
        arg, base = known
        offset = (tensor.storage_offset() - base.storage_offset()) * tensor.element_size()
        return Pointer(arg, offset.node.expr if isinstance(offset, torch.SymInt) else offset, tensor.dtype)

    def real(self, name: str, value: torch.SymFloat) -> Real:
        expression = value.node.expr
        if expression not in self.call.floats:
            raise BuildError(
                f"launch argument {name} is computed on the host, {value}; pass the argument itself and compute in the kernel"
            )
        return Real(self.call.floats[expression], FLOAT_HINT)


def _expression(value: torch.SymInt | torch.SymBool) -> Value:
    return at(value.node.expr, {})


class _OnlyViews(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses every tensor operation of a host function that is not a view, by its name."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if name.startswith(("aten.empty", "aten.new_empty")):
            raise BuildError(
                f"the host function allocates ({name}); write the kernel as an out-variant: it takes its results as arguments"
            )
        if not (getattr(func, "is_view", False) or func.namespace == "prim" or name.startswith("aten.sym_")):
            raise BuildError(
                f"the host function runs {name}; only views and one kernel launch can become a record: do it in the kernel"
            )
        return func(*args, **(kwargs or {}))


@contextmanager
def _host_globals(host: Callable[..., object]) -> Iterator[None]:
    """While the host function runs, `min` and `max` stay symbolic, and TMA descriptors are refused where they are made."""

    scope = _function(host).__globals__
    swapped: dict[str, object] = {"min": _symbolic(builtins.min, torch.sym_min), "max": _symbolic(builtins.max, torch.sym_max)}
    swapped |= {name: _NoDescriptors() for name, value in scope.items() if getattr(value, "__name__", "") == "TensorDescriptor"}
    saved = {name: scope[name] for name in swapped if name in scope}
    scope.update(swapped)
    try:
        yield
    finally:
        for name in swapped:
            del scope[name]
        scope.update(saved)


class _NoDescriptors:
    """Stands for Triton's TensorDescriptor, the call and the factory."""

    def __call__(self, *_args: object, **_kwargs: object) -> None:
        raise BuildError("host-made TMA descriptors are not supported yet; choose a config with pointer indexing")

    from_tensor = __call__


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
