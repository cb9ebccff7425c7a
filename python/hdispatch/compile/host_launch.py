"""One kernel launch that a host function makes: kernel, grid, arguments, known or as expressions in the call's sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch

from .expr import Value, at

#: Triton compiles different code for integers that are multiples of this, and for addresses that are.
ALIGNMENT = 16


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
