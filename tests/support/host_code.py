"""Code that launches Triton kernels in the ways of libraries: methods, modules, autograd functions, what wraps them."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
from adopted_kernels import add, nop, pointers_last, strides, typed


@triton.jit
def scaled(x, out, n):
    pass


def launch(x: torch.Tensor, kernel: Any = add) -> torch.Tensor:
    out = torch.empty_like(x)
    kernel[(1,)](x, x, out, x.numel(), BLOCK=256)
    return out


class Scale(torch.autograd.Function):
    """Launches one kernel forward, another backward."""

    @staticmethod
    def forward(_ctx: Any, x: torch.Tensor) -> torch.Tensor:
        """One launch."""
        return launch(x)

    @staticmethod
    def backward(_ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        """Another one."""
        scaled[(1,)](gradient, gradient, 1)
        return gradient


scale = Scale.apply


def through_apply(x: torch.Tensor) -> torch.Tensor:
    return Scale.apply(x)


def through_a_name(x: torch.Tensor) -> torch.Tensor:
    return scale(x)


class Layer(torch.nn.Module):
    """Has a kernel as an attribute, and launches it in a method."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = pointers_last

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As always."""
        self._launch(x)
        return launch(x)

    def _launch(self, x: torch.Tensor) -> None:
        self.kernel[(1,)](1, 1.0, x, x)


class Model(torch.nn.Module):
    """Modules within modules."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([Layer(), torch.nn.Linear(4, 4)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As always."""
        for layer in self.layers:
            x = layer(x)
        return x


class Runner:
    """A wrapper of a library's own."""

    kernel = nop

    def __init__(self) -> None:
        self.layer = Layer()

    def __call__(self, x: torch.Tensor) -> None:
        """As `run`."""
        self.run(x)

    def run(self, x: torch.Tensor) -> None:
        """A kernel of the class."""
        self.kernel[(1,)]()
        self.half(x)

    @property
    def half(self) -> Any:
        """Is looked into, and not called."""
        raise RuntimeError("properties are not to be called")
        return typed

    def whole(self, x: torch.Tensor) -> torch.Tensor:
        """A module that is an attribute."""
        return self.layer(x)

    @classmethod
    def make(cls) -> Runner:
        """A kernel of the module."""
        strides[(1,)]()
        return cls()


@torch.library.custom_op("hdispatch_host_code::launch", mutates_args=())
def op(x: torch.Tensor) -> torch.Tensor:
    return launch(x)


@functools.lru_cache
def cached() -> None:
    nop[(1,)]()


given = functools.partial(launch, kernel=nop)
bound = Runner().run
#: What may be adopted, and the names of the kernels that its code names.
CASES: dict[str, tuple[Any, set[str]]] = {
    "a function": (launch, {"add"}),
    "a method": (Runner().run, {"nop", "typed"}),
    "a method that calls a module": (Runner().whole, {"add", "pointers_last"}),
    "a class method": (Runner.make, {"strides"}),
    "an object": (Runner(), {"nop", "typed"}),
    "a class": (Runner, {"nop", "typed", "strides", "add", "pointers_last"}),
    "a module": (Layer(), {"add", "pointers_last"}),
    "a module of modules": (Model(), {"add", "pointers_last"}),
    "an autograd function": (Scale, {"add", "scaled"}),
    "its apply": (Scale.apply, {"add", "scaled"}),
    "a function that applies it": (through_apply, {"add", "scaled"}),
    "a function that applies it by a name": (through_a_name, {"add", "scaled"}),
    "a partial": (functools.partial(launch), {"add"}),
    "a partial that gives the kernel": (given, {"add", "nop"}),
    "a partial of a partial": (functools.partial(given, None), {"add", "nop"}),
    "a custom op": (op, {"add"}),
    "a cached function": (cached, {"nop"}),
}
