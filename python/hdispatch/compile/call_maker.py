"""Calls of an op on fake tensors, symbolic or with everything known, for running host functions on."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from ..errors import BuildError
from ..opspec import CALL_SYMBOLS, SYMBOLS, Arg, FloatArg, IntArg, NoneArg, OpSpec, TensorArg, Variant
from .host_launch import ALIGNMENT

#: A row stride is its width plus this many elements, where nothing else is asked for: then it is like no size.
ROW_PADDING = ALIGNMENT

#: Floats have this value where one is needed; which one does not matter.
FLOAT_HINT = 0.625


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
    #: what the host function is to allocate and return: the op's arguments, and tensors as they have to be
    outputs: tuple[tuple[TensorArg, torch.Tensor], ...] = ()

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensor arguments that are present."""
        for name, arg in zip(self.names, self.args, strict=True):
            if isinstance(arg, torch.Tensor):
                yield name, arg


class Ignored:
    """Stands for a flag that every variant accepts: a host function that looks at it would depend on the call."""

    def __bool__(self) -> bool:
        """Raise."""
        raise BuildError("the host function looks at a flag without values; list them in the op's spec: BoolArg(name)")


@dataclass(frozen=True)
class CallMaker:
    """Makes calls of one variant and shape of an op: known is what is compiled in.

    Free are M, the sizes that `shape` leaves out, `*` dimensions, free strides, run-time integers and floats. A free
    integer is a leaf of the record's expressions and has the leaf's name: "M", "K", "x.size(0)", "x.stride(0)", "heads".
    `second` is the example value of the integer with a ladder; None: its first edge. `allocates`: the host function makes what
    the op returns itself, so that calls have it in `outputs` and not among the arguments.
    """

    spec: OpSpec
    variant: Variant
    shape: Mapping[str, int]
    second: int | None = None
    allocates: bool = False

    def symbolic(self, hint: int, *, floats: bool = True) -> Call:
        """A call whose free sizes are symbolic (floats too, if `floats`).

        `hint` is the example M, at least 2: a hint of 1 would merge M with every size that is 1.
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
        call.outputs = self._outputs(call.mode, leaf)
        return call

    def concrete(self, m: int, row_padding: int = ROW_PADDING, sizes: Mapping[str, int] | None = None) -> Call:
        """A call with everything known, as `leaf_values` says. All configs of a variant and shape get the same one."""
        known, asked = (tuple(sorted((given or {}).items())) for given in (self.shape, sizes))
        key = (id(self.spec), self.variant.name, known, self.second, self.allocates, m, row_padding, asked)
        if key not in _CONCRETE:
            mode = _concrete_mode()
            values = self.leaf_values(m, row_padding, sizes)
            args = self._args(mode, values.__getitem__, lambda _name: FLOAT_HINT)
            call = Call(self._host_names(), args, mode, outputs=self._outputs(mode, values.__getitem__))
            if len(_CONCRETE) >= _MAX_CONCRETE:
                _CONCRETE.clear()
            _CONCRETE[key] = self.spec, call
        return _CONCRETE[key][1]

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
        """The present arguments that have a free row stride and no other free stride."""
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
        """Every size that is known, and the example sizes."""
        whole = {**self._sizes(None), "M": 1}
        return {size for arg in self.present() for size in self._known_dims(arg, whole)}

    def other_sizes(self) -> list[dict[str, int]]:
        """More values of the generic sizes, at which a record is checked."""
        if not self.generic():
            return []
        return [{symbol: sizes[SYMBOLS.index(symbol) - 1] for symbol in self.generic()} for sizes in _OTHER_SIZES]

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
        """The number that a leaf is assumed to be a multiple of; a guard tests it where it matters."""
        if name in SYMBOLS:
            return ALIGNMENT if name in ("K", "N") else 1
        argument, _, field_name = name.partition(".stride(")
        arg = next((arg for arg in self.present() if arg.name == argument), None)
        if arg is not None and field_name and arg.layout == "any":
            return arg.multiple if int(field_name.rstrip(")")) < len(arg.dims) - 1 else 1
        if arg is None or not field_name or arg.layout not in ("rows", "columns"):
            return 1
        # Rows that are contiguous must not fail the guard. Generic sizes are taken to be multiples.
        whole = {**dict.fromkeys(("K", "N"), ALIGNMENT), **dict.fromkeys(CALL_SYMBOLS, 1), **self.shape, "M": 1}
        dims = [abs(size) for size in self.spec.tensor_sizes(arg, whole, self.variant.static)]
        width = dims[0] if arg.layout == "columns" else math.prod(dims[1:])
        return ALIGNMENT if width % ALIGNMENT == 0 else 1

    def _names(self) -> tuple[str, ...]:
        return tuple(arg.name for arg in self.spec.args)

    def _host_names(self) -> tuple[str, ...]:
        """The parameters of a host function: the op's arguments and its workspace."""
        workspace = self.spec.workspace
        names = tuple(arg.name for arg in self._given())
        return names if workspace is None else (*names, workspace.name)

    def _given(self) -> tuple[Arg, ...]:
        """The op's arguments that the host function takes."""
        args = self.spec.args
        return args[: len(args) - len(self.spec.returned)] if self.allocates else args

    def _outputs(self, mode: FakeTensorMode, leaf: Callable[[str], Any]) -> tuple[tuple[TensorArg, torch.Tensor], ...]:
        if not self.allocates:
            return ()
        return tuple((arg, self._tensor(mode, arg, leaf)) for arg in self.spec.returned)

    def _workspace(self, mode: FakeTensorMode) -> tuple[torch.Tensor | None, ...]:
        if self.spec.workspace is None:
            return ()
        size = self.spec.workspace_bytes(self.variant)
        return (_empty(mode, self.spec.workspace.name, torch.uint8, [size], [1]) if size else None,)

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

        return (*(value(arg) for arg in self._given()), *self._workspace(mode))

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
        return _empty(mode, arg.name, self.variant.dtypes[arg.name], sizes, strides)


#: Sample calls by spec, variant and sizes, which the records of all its configs share. The spec is there to keep its id.
_SAMPLES: dict[tuple[int, str, tuple[tuple[str, int], ...]], tuple[OpSpec, dict[str, Any]]] = {}

#: Concrete calls likewise, of the units that a process had last.
_CONCRETE: dict[tuple[object, ...], tuple[OpSpec, Call]] = {}
_MAX_CONCRETE = 1000

#: Tensors of concrete calls by argument, dtype, sizes and strides: most are the same for every M, and making one takes longer
#: than all else. An argument has one of its own, for a trace tells arguments apart by their storage.
_TENSORS: dict[tuple[object, ...], torch.Tensor] = {}
_MAX_TENSORS = 20_000


@functools.cache
def _concrete_mode() -> FakeTensorMode:
    """The mode of all concrete calls. Made when it is first asked for: after the target is installed."""
    return FakeTensorMode()


#: Values of the generic sizes, K, N, A and B, at which a record is checked against the host function besides the hints.
_OTHER_SIZES = ((2048, 4096, 1, 16), (5120, 1024, 2, 1), (12288, 25600, 13, 5), (1024, 2048, 16, 3))


def _empty(mode: FakeTensorMode, name: str, dtype: torch.dtype, sizes: Sequence[Any], strides: Sequence[Any]) -> torch.Tensor:
    """A fake tensor for an argument; of a concrete call's the one that was made before."""
    key = (name, dtype, *sizes, None, *strides)
    if mode is _concrete_mode() and key in _TENSORS:
        return _TENSORS[key]
    with mode:
        made = torch.empty_strided(sizes, strides, dtype=dtype, device="cuda")
    if mode is _concrete_mode():
        if len(_TENSORS) >= _MAX_TENSORS:
            _TENSORS.clear()
        _TENSORS[key] = made
    return made


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
