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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import sympy  # type: ignore[import-untyped]
import torch
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import BuildError
from ..opspec import SYMBOLS, Arg, FloatArg, IntArg, NoneArg, OpSpec, TensorArg, Variant
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
class Descriptor:
    """A TMA descriptor that the host makes of a tensor argument's memory, from `offset` bytes on.

    Sizes and strides are in elements, outermost dimension first; the last stride is 1.
    """

    arg: str
    offset: Value
    dtype: torch.dtype
    shape: tuple[Value, ...]
    strides: tuple[Value, ...]
    block_shape: tuple[int, ...]
    fill_nan: bool
    tf32: bool

    def at(self, values: Mapping[sympy.Symbol, int]) -> Descriptor:
        """This descriptor with symbols replaced by values."""
        shape, strides = (tuple(at(value, values) for value in listed) for listed in (self.shape, self.strides))
        return replace(self, offset=at(self.offset, values), shape=shape, strides=strides)

    def odd_strides(self) -> list[int]:
        """The known strides that TMA does not take: all but the last are multiples of 16 bytes."""
        known = [stride for stride in self.strides[:-1] if isinstance(stride, int)]
        return [stride for stride in known if stride * self.dtype.itemsize % ALIGNMENT]

    def parameters(self, name: str) -> dict[str, Descriptor | Number]:
        """The parameters that Triton's calling convention makes of it: the map, its sizes, its strides."""
        sizes = {f"{name}.shape[{i}]": Number(value) for i, value in enumerate(self.shape)}
        strides = {f"{name}.strides[{i}]": Number(value) for i, value in enumerate(self.strides)}
        return {name: self, **sizes, **strides}


@dataclass(frozen=True)
class Constant:
    """None, a string, a dtype, …: something that no kernel takes at run time."""

    value: object


HostArg = Pointer | Number | Flag | Real | Descriptor | Constant


@dataclass(frozen=True)
class Launch:
    """One launch. `kernel` is a triton.JITFunction; args by its parameters' names, in their order; the grid has 3 entries."""

    kernel: Any
    grid: tuple[Value, Value, Value]
    args: dict[str, HostArg]
    options: dict[str, object]

    def at(self, values: Mapping[sympy.Symbol, int]) -> Launch:
        """This launch with symbols replaced by values."""

        def concrete(arg: HostArg) -> HostArg:
            if isinstance(arg, Descriptor):
                return arg.at(values)
            if isinstance(arg, Pointer):
                return Pointer(arg.arg, at(arg.offset, values), arg.dtype)
            if isinstance(arg, (Number, Flag)):
                return type(arg)(at(arg.value, values))
            return arg

        x, y, z = (at(size, values) for size in self.grid)
        return Launch(self.kernel, (x, y, z), {name: concrete(arg) for name, arg in self.args.items()}, self.options)

    def parameters(self) -> dict[str, HostArg]:
        """The arguments as parameters: a descriptor is several."""
        return {
            key: value
            for name, arg in self.args.items()
            for key, value in (arg.parameters(name) if isinstance(arg, Descriptor) else {name: arg}).items()
        }


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


class Ignored:
    """Stands for a flag that every variant accepts: a host function that looks at it would depend on the call."""

    def __bool__(self) -> bool:
        """Refuses."""
        raise BuildError("the host function looks at a flag without values; list them in the op's spec: BoolArg(name)")


@dataclass(frozen=True)
class CallMaker:
    """Makes calls of one variant and shape of an op: known is what is compiled in.

    Free are M, the sizes that `shape` leaves out, `*` dimensions, free strides, run-time integers and floats. A free
    integer is a leaf of the record's expressions and has the leaf's name: "M", "K", "x.size(0)", "x.stride(0)", "heads".
    The integer with a ladder is thought of as `second`; None: its first edge.
    """

    spec: OpSpec
    variant: Variant
    shape: Mapping[str, int]
    second: int | None = None

    def symbolic(self, hint: int, *, floats: bool = True) -> Call:
        """A call with all that is free symbolic, floats if asked for; M is thought of as `hint` (at least 2).

        A hint of 1 would merge M with every size that is 1.
        """
        env = ShapeEnv(duck_shape=False, specialize_zero_one=False)
        call = Call(self._host_names(), (), FakeTensorMode(shape_env=env), env)
        made: dict[str, Any] = {}
        thought_of = self.leaf_values(hint)

        def leaf(name: str) -> Any:
            if name not in made:
                source, value = ConstantSource(name), thought_of[name]
                create = env.create_symbol if "(" in name or name in SYMBOLS else env.create_unspecified_symbol
                symbol = create(value, source, dynamic_dim=DimDynamic.DYNAMIC)
                call.leaves[symbol] = name
                made[name] = env.create_symintnode(symbol, hint=value, source=source)
                call.multiples[symbol] = self._multiple(name)
            return made[name]

        def real(name: str) -> Any:
            if not floats:
                return FLOAT_HINT
            source = ConstantSource(name)
            symbol = env.create_unspecified_symbol(FLOAT_HINT, source, dynamic_dim=DimDynamic.DYNAMIC)
            call.floats[symbol] = name
            return env.create_symfloatnode(symbol, hint=FLOAT_HINT, source=source)

        call.args = self._args(call.mode, leaf, real)
        return call

    def concrete(self, m: int, row_padding: int = ROW_PADDING, sizes: Mapping[str, int] | None = None) -> Call:
        """A call with everything known, as `leaf_values` says."""
        mode = FakeTensorMode()
        values = self.leaf_values(m, row_padding, sizes)
        return Call(self._host_names(), self._args(mode, values.__getitem__, lambda _name: FLOAT_HINT), mode)

    def leaf_values(self, m: int, row_padding: int = ROW_PADDING, sizes: Mapping[str, int] | None = None) -> dict[str, int]:
        """A value for every leaf: M = m; sizes that are generic as given, or as the spec hints; others as in a sample call.
        `sizes` may have the integer with a ladder too.

        Free strides are those of a contiguous tensor with rows (or columns) `row_padding` elements longer than their width;
        a broadcast tensor has one element where row_padding is 0; of layout "any", large paddings are column-major.
        Strides of dimensions of size 1 are as in `_free_strides`.
        """
        given = dict(sizes or {})
        ladders = self.spec.ladders
        second = given.pop(ladders.arg, None) if ladders.arg is not None else None
        whole = {**self._sizes(given), "M": m}
        values = {symbol: whole[symbol] for symbol in ("M", *self.generic())}
        for arg in self.present():
            dims = self._known_dims(arg, whole)
            values |= {f"{arg.name}.size({i})": dims[i] for i, dim in enumerate(arg.dims) if dim == "*"}
            values |= {f"{arg.name}.stride({i})": stride for i, stride in _free_strides(arg, dims, row_padding).items()}
        for integer in self.integers():
            if integer.name == ladders.arg:
                values[integer.name] = next(value for value in (second, self.second, ladders.second[0]) if value is not None)
            else:
                values[integer.name] = int(self._sampled(whole)[integer.name])
        return values

    def generic(self) -> tuple[str, ...]:
        """The sizes other than M that are not known."""
        return tuple(
            symbol for symbol in self.spec.symbols() if symbol != "M" and symbol not in self.shape and self._has(symbol)
        )

    def integers(self) -> list[IntArg]:
        """The integers that are not compiled in."""
        return [arg for arg in self.spec.args if isinstance(arg, IntArg) and arg.values is None]

    def present(self) -> list[TensorArg]:
        """The tensor arguments that are not None."""
        return [arg for arg in self.spec.tensors() if arg.name not in self.variant.none]

    def row_strided(self) -> list[TensorArg]:
        """The present arguments whose row stride is free and no other."""
        return [arg for arg in self.present() if arg.layout == "rows" and len(arg.dims) > 1]

    def freely_strided(self) -> list[TensorArg]:
        """The present arguments with other free strides."""
        return [arg for arg in self.present() if arg.layout in ("columns", "any")]

    def rows(self, arg: TensorArg, m: Any) -> Any:
        """The size of the first dimension for M = m."""
        return self.spec.tensor_sizes(arg, {**self._sizes(None), "M": m}, self.variant.static)[0]

    def elements(self, m: int, sizes: Mapping[str, int] | None = None) -> int:
        """Elements of the largest tensor for M = m."""
        whole = {**self._sizes(sizes), "M": m}
        return max(math.prod(self._known_dims(arg, whole)) for arg in self.present())

    def dims(self) -> set[int]:
        """Every size that is known, and the ones thought of."""
        whole = {**self._sizes(None), "M": 1}
        return {size for arg in self.present() for size in self._known_dims(arg, whole)}

    def other_sizes(self) -> list[dict[str, int]]:
        """More values of the generic sizes, to hold a record against."""
        if not self.generic():
            return []
        return [dict(zip(self.generic(), values, strict=False)) for values in _OTHER_SIZES]

    def _has(self, symbol: str) -> bool:
        binder = self.spec.binder(symbol)
        return binder is not None and binder[0].name not in self.variant.none

    def _sizes(self, sizes: Mapping[str, int] | None) -> dict[str, int]:
        hints = {symbol: self.spec.hint(symbol) if self._has(symbol) else 0 for symbol in self.spec.symbols() if symbol != "M"}
        given = {symbol: size for symbol, size in (sizes or {}).items() if symbol in SYMBOLS}
        return {**hints, **self.shape, **given}

    def _known_dims(self, arg: TensorArg, whole: Mapping[str, int]) -> list[int]:
        dims = self.spec.tensor_sizes(arg, whole, self.variant.static)
        if -1 in dims:
            sampled = self._sampled(whole)[arg.name]
            dims = [sampled.size(i) if size == -1 else size for i, size in enumerate(dims)]
        return dims

    def _sampled(self, whole: Mapping[str, int]) -> dict[str, Any]:
        """The arguments of a sample call of two rows, by name; tensors without their data."""
        sizes = tuple(sorted((name, size) for name, size in whole.items() if name != "M"))
        key = (id(self.spec), self.variant.name, sizes)
        if key not in _SAMPLES:
            second = {name: size for name, size in self.spec.ladders.edges(0).items() if name != "M"}
            args = self.spec.sample(
                self.variant, {**dict(sizes), **second, "M": 2}, torch.device("cpu"), torch.Generator().manual_seed(0)
            )
            bare = (arg.to("meta") if isinstance(arg, torch.Tensor) else arg for arg in args)
            _SAMPLES[key] = self.spec, dict(zip(self._names(), bare, strict=True))
        return _SAMPLES[key][1]

    def _multiple(self, name: str) -> int:
        """What a leaf may be taken to be a multiple of; a guard tests it where it matters."""
        if name in SYMBOLS:
            return 1 if name == "M" else ALIGNMENT
        argument, _, field_name = name.partition(".stride(")
        arg = next((arg for arg in self.present() if arg.name == argument), None)
        if arg is not None and field_name and arg.layout == "any":
            return arg.multiple if int(field_name.rstrip(")")) < len(arg.dims) - 1 else 1
        if arg is None or not field_name or arg.layout not in ("rows", "columns"):
            return 1
        # Rows that are contiguous must not fail the guard. Generic sizes are taken to be multiples.
        whole = {**dict.fromkeys(("K", "N"), ALIGNMENT), **self.shape, "M": 1}
        dims = [abs(size) for size in self.spec.tensor_sizes(arg, whole, self.variant.static)]
        width = dims[0] if arg.layout == "columns" else math.prod(dims[1:])
        return ALIGNMENT if width % ALIGNMENT == 0 else 1

    def _names(self) -> tuple[str, ...]:
        return tuple(arg.name for arg in self.spec.args)

    def _host_names(self) -> tuple[str, ...]:
        """What a host function takes: the op's arguments and its workspace."""
        workspace = self.spec.workspace
        return self._names() if workspace is None else (*self._names(), workspace.name)

    def _workspace(self, mode: FakeTensorMode) -> tuple[torch.Tensor | None, ...]:
        if self.spec.workspace is None:
            return ()
        size = self.spec.workspace_bytes(self.variant)
        with mode:
            return (torch.empty(size, dtype=torch.uint8, device="cuda") if size else None,)

    def _args(self, mode: FakeTensorMode, leaf: Callable[[str], Any], real: Callable[[str], Any]) -> tuple[object, ...]:
        def value(arg: Arg) -> object:
            if isinstance(arg, FloatArg):
                return real(arg.name)
            if isinstance(arg, NoneArg) or arg.name in self.variant.none:
                return None
            if isinstance(arg, TensorArg):
                return self._tensor(mode, arg, leaf)
            if arg.values is not None:
                return self.variant.static[arg.name]
            return leaf(arg.name) if isinstance(arg, IntArg) else Ignored()

        return (*(value(arg) for arg in self.spec.args), *self._workspace(mode))

    def _tensor(self, mode: FakeTensorMode, arg: TensorArg, leaf: Callable[[str], Any]) -> torch.Tensor:
        whole = {
            symbol: leaf(symbol) if symbol == "M" or symbol in self.generic() else self.shape.get(symbol, 0)
            for symbol in self.spec.symbols()
        }
        sizes = self.spec.tensor_sizes(arg, whole, self.variant.static)
        sizes = [leaf(f"{arg.name}.size({i})") if arg.dims[i] == "*" else size for i, size in enumerate(sizes)]
        strides: list[Any] = [1] * len(sizes)
        for index in reversed(range(len(sizes) - 1)):
            strides[index] = strides[index + 1] * sizes[index + 1]
        if arg.layout == "columns":
            strides[0] = 1
        for index in arg.free_strides():
            strides[index] = leaf(f"{arg.name}.stride({index})")
        with mode:
            return torch.empty_strided(sizes, strides, dtype=self.variant.dtypes[arg.name], device="cuda")


#: Sample calls by spec, variant and sizes, which the records of all its configs share. The spec is there to keep its id.
_SAMPLES: dict[tuple[int, str, tuple[tuple[str, int], ...]], tuple[OpSpec, dict[str, Any]]] = {}

#: Values of the generic sizes, K first, at which a record is held against the host function besides the hints.
_OTHER_SIZES = ((2048, 4096), (5120, 1024), (12288, 25600), (1024, 2048))


def _free_strides(arg: TensorArg, dims: Sequence[int], row_padding: int) -> dict[int, int]:
    """As a record gets them: the stride of a dimension of size 1, which means nothing, is that of a contiguous tensor."""
    strides = _padded_strides(arg, dims, row_padding)
    inner = {index: dims[:index] if arg.layout == "columns" else dims[index + 1 :] for index in strides}
    whole = {index: math.prod(max(size, 1) for size in inner[index]) for index in strides}
    return {index: stride if dims[index] > 1 else whole[index] for index, stride in strides.items()}


def _padded_strides(arg: TensorArg, dims: Sequence[int], row_padding: int) -> dict[int, int]:
    if arg.broadcast:
        return {0: int(row_padding > 0)}
    if arg.layout == "rows":
        return {0: math.prod(dims[1:]) + row_padding}
    if arg.layout == "columns":
        return {1: dims[0] + row_padding}
    if arg.layout == "any":
        upward = row_padding > 2 * ROW_PADDING and len(dims) == 2
        order = list(range(len(dims))) if upward else list(reversed(range(len(dims))))
        strides, stride = {}, 1
        for place, index in enumerate(order):
            strides[index] = stride
            stride *= dims[index]
            stride += row_padding if place == 0 else 0
        return strides
    return {}


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
    recorder = _Recorder(call, launches)
    with _host_globals(host), call.mode, _OnlyViews():  # type: ignore[no-untyped-call]
        host(*call.args, _launcher=recorder)
    if len(launches) != 1:
        names = [launch.kernel.__name__ for launch in launches]
        raise BuildError(f"the host function launches {len(launches)} kernels {names}; a record holds exactly one")
    guards = tuple(guard.expr for guard in call.env.guards) if call.env is not None else ()
    return Trace(launches[0], guards, call.leaves, call.multiples | _guarded_multiples(guards))


def _guarded_multiples(guards: Sequence[sympy.Basic]) -> dict[sympy.Symbol, int]:
    """What the host function made sure of by a branch: `if x.stride(0) % 16: raise …`."""
    found: dict[sympy.Symbol, int] = {}
    for guard in guards:
        if not isinstance(guard, sympy.Equality) or guard.args[1] != 0 or len(guard.args[0].args) != 2:
            continue
        symbol, by = guard.args[0].args
        if type(guard.args[0]).__name__ in ("Mod", "PythonMod") and isinstance(symbol, sympy.Symbol) and by.is_Integer:
            found[symbol] = math.lcm(found.get(symbol, 1), int(by))
    return found


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
        if type(value).__name__ == "TensorDescriptor":
            return self.descriptor(name, value)
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


def _expression(value: torch.SymInt | torch.SymBool) -> Value:
    return at(value.node.expr, {})


def _descriptor_problem(shape: Sequence[Value], strides: Sequence[Value], block: Sequence[object]) -> str | None:
    """What no TMA descriptor can be; what depends on the call, the launcher tests."""
    if not len(shape) == len(strides) == len(block) or not 1 <= len(shape) <= 5:
        return f"of {len(shape)} sizes, {len(strides)} strides and {len(block)} block sizes; it takes 1 to 5, as many of each"
    if not all(isinstance(size, int) for size in block):
        return f"with the block {list(block)}, which is not known when it is built; block sizes come from the config"
    if strides[-1] != 1:
        return f"whose last stride is {strides[-1]}; it takes 1: transpose the tensor"
    return None


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
    """While the host function runs, `min` and `max` stay symbolic, and TMA descriptors keep what they are made of."""

    scope = _function(host).__globals__
    swapped: dict[str, object] = {"min": _symbolic(builtins.min, torch.sym_min), "max": _symbolic(builtins.max, torch.sym_max)}
    swapped |= {name: TensorDescriptor for name, value in scope.items() if getattr(value, "__name__", "") == "TensorDescriptor"}
    saved = {name: scope[name] for name in swapped if name in scope}
    scope.update(swapped)
    try:
        yield
    finally:
        for name in swapped:
            del scope[name]
        scope.update(saved)


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
        """Of a whole tensor."""
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
