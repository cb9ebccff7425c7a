"""Arguments of one op at any M: a fixed M, Ms that cycle, Ms never seen before."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from ..errors import HdispatchError
from ..opspec import Arg, OpSpec, TensorArg, Variant, parse_dim

#: How M goes from call to call.
MKind = Literal["fixed", "cycling", "unseen"]
M_KINDS: tuple[MKind, ...] = ("fixed", "cycling", "unseen")
CYCLE = (2, 3, 7, 16)
#: Ms never seen before are drawn from 2..LARGEST_M: M = 1 is left out, because Helion 1.5.0 may fail to compile it.
LARGEST_M = 8192

Arguments = tuple[Any, ...]
MakeBatch = Callable[[], Sequence[Arguments]]


@dataclass(frozen=True)
class Workload:
    """Arguments of one variant of an op on one device, cut for each M out of tensors made once.

    Tensors that have M are zeros: host time depends on sizes, strides and dtypes alone. All else is as in a sample call.
    """

    spec: OpSpec
    variant: Variant
    shape: dict[str, int]
    m: int
    device: torch.device
    largest: int = LARGEST_M
    whole: list[Any] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not 1 <= self.m <= self.largest:
            raise HdispatchError(f"M is {self.m}; it takes 1 to {self.largest}")
        sizes = {"K": 0, "N": 0, **self.shape, "M": 2}
        sample = self.spec.sample(self.variant, sizes, self.device, torch.Generator(self.device).manual_seed(0))
        whole = [self._enlarged(arg, value) for arg, value in zip(self.spec.args, sample, strict=True)]
        object.__setattr__(self, "whole", whole)

    def _enlarged(self, arg: Arg, value: Any) -> Any:
        """An argument of a call with M = 2, made for the largest M where its size depends on that."""
        if not isinstance(arg, TensorArg) or value is None or not _has_m(arg):
            return value
        sizes = [self.largest * parse_dim(arg.dims[0]).factor, *value.shape[1:]]
        return torch.zeros(sizes, dtype=value.dtype, device=self.device)

    def at(self, m: int) -> Arguments:
        """The arguments of a call with M = m, which share memory with those of every other M."""
        return tuple(_cut(arg, value, m) for arg, value in zip(self.spec.args, self.whole, strict=True))

    def maker(self, kind: MKind, calls: int, order: random.Random) -> MakeBatch:
        """Makes batches of `calls` arguments, M going as `kind` says. Unseen Ms never repeat within one maker."""
        if kind == "fixed":
            fixed = [self.at(self.m)] * calls
            return lambda: fixed
        if kind == "cycling":
            turn = [self.at(m) for m in CYCLE]
            cycling = list(itertools.islice(itertools.cycle(turn), calls))
            return lambda: cycling
        pool = unseen_pool(self.m, self.largest)
        order.shuffle(pool)

        def unseen() -> list[Arguments]:
            if len(pool) < calls:
                raise HdispatchError(f"every M from 2 to {self.largest} has been used; ask for fewer rounds")
            return [self.at(pool.pop()) for _ in range(calls)]

        return unseen


def unseen_pool(m: int, largest: int = LARGEST_M) -> list[int]:
    """The Ms that neither the fixed nor the cycling calls use."""
    return [each for each in range(2, largest + 1) if each != m and each not in CYCLE]


def _has_m(arg: TensorArg) -> bool:
    """Whether M is in the first dimension. HdispatchError if it is in another."""
    for axis, dim in enumerate(arg.dims[1:], 1):
        if parse_dim(dim).symbol == "M":
            raise HdispatchError(f"{arg.name} has M in dimension {axis}: cut there it would not be contiguous")
    return bool(arg.dims) and parse_dim(arg.dims[0]).symbol == "M"


def _cut(arg: Arg, value: Any, m: int) -> Any:
    if not isinstance(arg, TensorArg) or value is None or not _has_m(arg):
        return value
    return value[: parse_dim(arg.dims[0]).factor * m]
