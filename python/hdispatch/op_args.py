"""The arguments of an op: tensors, numbers, flags, strings and None, each with the checks of its own declaration.

`hdispatch.opspec` says what they mean together, and is where an op's declaration imports them from.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from .errors import HdispatchError

#: Sizes that are in a row's key: M in buckets, K and N exactly, or any.
KEY_SYMBOLS = ("M", "K", "N")
#: Sizes that only a call knows: no row has them in its key, and no kernel has them compiled in.
CALL_SYMBOLS = ("A", "B")
#: Symbols that `TensorArg.dims` may use, in the order of the C++ `Symbol` enumeration.
SYMBOLS = (*KEY_SYMBOLS, *CALL_SYMBOLS)

Layout = Literal["contiguous", "rows", "columns", "any"]

#: A value that is compiled in.
Static = int | bool | str

#: Arguments of an op, and values that one of them lists: csrc/op.h has four bits for each.
MAX_ARGS, MAX_VALUES = 32, 13
#: Edges of a ladder, as csrc/ladder.h.
MAX_EDGES = 64


@dataclass(frozen=True)
class TensorArg:
    """A tensor argument. `dims` and `dtypes` as in the module's text; `mutated` means that the op writes it.

    layout     "contiguous"
               "rows"      the stride of the first dimension is free, at least a row's width if the op writes it
               "columns"   rank 2, the first dimension contiguous and the second one's stride free likewise
               "any"       every stride is free
    flat       one entry in dims; a contiguous tensor of any rank with that many elements is taken as 1-D
    broadcast  with flat: a tensor with one element serves too, as one of stride 0
    pad        a tensor of lower rank gets dimensions of size 1 after its first one: [M, K] for ("M", "N", "K")
    merge      of a tensor of higher rank the leading dimensions become one, where their strides allow it: [1, M, K] for
               ("M", "K"). Of rank 2, and with M known from another argument, those of M elements, and the others become
               one too: [M, heads, head_size] for ("M", "K")
    multiple   with layout "any", 16: the strides of all dimensions but the last are taken to be multiples of 16 elements
               where that makes better code (whole vectors in Triton), and a guard tests it there; else 1
    in_place   name of the argument that it may be, as the same view; the kernels read all of a row before they write it.
               Otherwise what is written shares no memory with any other argument.
    returned   the op allocates and returns it: callers do not give it. Contiguous, written, behind all other arguments
    zeroed     with returned: it is zero when the kernel begins, as `torch.zeros`; whoever gives one himself gives zeros
    """

    name: str
    dims: tuple[str | int, ...]
    dtypes: tuple[torch.dtype, ...] | str
    mutated: bool = False
    optional: bool = False
    layout: Layout = "contiguous"
    flat: bool = False
    broadcast: bool = False
    pad: bool = False
    merge: bool = False
    in_place: str | None = None
    multiple: int = 1
    returned: bool = False
    zeroed: bool = False

    def free_strides(self) -> tuple[int, ...]:
        """The dimensions whose stride differs from call to call."""
        if self.broadcast:
            return (0,)
        return {"contiguous": (), "rows": (0,), "columns": (1,), "any": tuple(range(len(self.dims)))}[self.layout]

    def symbols(self) -> set[str]:
        """The symbols that its dimensions come from: {"M", "K"} for ("M", "K/128")."""
        return {symbol for dim in self.dims if (symbol := parse_dim(dim).symbol) in SYMBOLS and symbol is not None}

    def faults(self) -> Iterator[str]:
        """Why no op can have it."""
        if (self.flat and len(self.dims) != 1) or (self.broadcast and not self.flat):
            yield f"{self.name}: flat takes one dimension, and broadcast takes flat"
        if self.merge and (self.flat or len(self.dims) < 2):
            yield f"{self.name}: merge takes two dimensions or more, and not flat"
        if self.multiple not in ((1, 16) if self.layout == "any" else (1,)):
            yield f"{self.name} has multiple {self.multiple}; it takes 1, with the layout 'any' 16 too"
        if self.returned and not (self.mutated and self.layout == "contiguous" and not self.optional and not self.in_place):
            yield f"{self.name} is returned; it takes mutated=True, the layout 'contiguous', and neither optional nor in_place"
        if self.returned and ("*" in self.dims or self.flat or self.pad or self.merge):
            yield f"{self.name} is returned; its dimensions are symbols and numbers, and it is not flat, pad or merge"
        if self.returned and not isinstance(self.dtypes, str) and len(self.dtypes) != 1:
            yield f"{self.name} is returned; it takes one dtype, or the name of an argument that has the same"
        if self.zeroed and not self.returned:
            yield f"{self.name} is zeroed; only what the op allocates is: returned=True"
        if self.layout == "columns" and len(self.dims) != 2:
            yield f"{self.name} has {len(self.dims)} dimensions; the layout 'columns' takes 2"


@dataclass(frozen=True)
class FloatArg:
    """A Python float, finite and at least `minimum`; it reaches the kernel as float32 and is not compiled in."""

    name: str
    minimum: float = float("-inf")

    def faults(self) -> Iterator[str]:
        """Why no op can have it: every one can."""
        return iter(())


@dataclass(frozen=True)
class IntArg:
    """An integer. With `values` it is compiled in, part of the variant; without, any of at least `minimum` at run time.

    ladder   of one run-time integer of an op, with a minimum of at least 1: the upper edges of buckets of its value, ascending;
             the last has no upper end. A config is then chosen for each bucket of M and of it. The kernel still gets the value
    """

    name: str
    values: tuple[int, ...] | None = None
    default: int | None = None
    minimum: int = -(2**31)
    ladder: tuple[int, ...] | None = None

    def faults(self) -> Iterator[str]:
        """Why no op can have it."""
        yield from _value_faults(self.name, self.values)
        if self.ladder is None:
            return
        if self.values is not None or self.minimum < 1:
            yield f"{self.name} has a ladder; it takes a minimum of at least 1 and no values"
        if not is_ladder(self.ladder, self.minimum) or len(self.ladder) > MAX_EDGES:
            yield (
                f"the ladder {self.ladder} of {self.name} is not a list of 1 to {MAX_EDGES} ascending edges of at least "
                f"{self.minimum}"
            )


@dataclass(frozen=True)
class StrArg:
    """A string that is one of `values`, compiled in as an integer's are; any other is a miss. Any Unicode, NUL and "" too.

    default   one of the values, of printable ASCII without quotes and backslashes: torch's schemas hold no other
    """

    name: str
    values: tuple[str, ...]
    default: str | None = None

    def faults(self) -> Iterator[str]:
        """Why no op can have it."""
        yield from _value_faults(self.name, self.values)
        for value in self.values:
            if not isinstance(value, str) or not _is_utf8(value):
                yield f"{self.name} lists {value!r}; it takes strings that UTF-8 has"
        if self.default is None:
            return
        if self.default not in self.values:
            yield f"the default of {self.name} is {self.default!r}, none of its values {self.values}"
        if not re.fullmatch(r"""[ !#-&(-\[\]-~]*""", self.default):
            yield (
                f"the default of {self.name} is {self.default!r}; torch's schemas take printable ASCII without quotes and "
                "backslashes there"
            )


@dataclass(frozen=True)
class BoolArg:
    """A flag. With `values` it is compiled in; without (`values=None`) it is accepted and no variant depends on it."""

    name: str
    values: tuple[bool, ...] | None = (False, True)
    default: bool | None = None

    def faults(self) -> Iterator[str]:
        """Why no op can have it."""
        yield from _value_faults(self.name, self.values)


@dataclass(frozen=True)
class NoneArg:
    """An argument of a torch `type` (such as "int[]?") of which only None is served; anything else is a miss.

    ignored   anything is served: no kernel depends on it in calls that its guards let through
    """

    name: str
    type: str = "int[]?"
    ignored: bool = False

    def faults(self) -> Iterator[str]:
        """Why no op can have it."""
        if self.ignored and self.type != "int[]?":
            yield f"{self.name} is ignored and of type {self.type}; only arguments of type int[]? can be ignored"


Arg = TensorArg | FloatArg | IntArg | StrArg | BoolArg | NoneArg


class Dim(NamedTuple):
    """A dimension: `factor * symbol / divisor` rounded up; `symbol` None: exactly `factor`; "*": any size.

    divisor is a number or the name of a static integer argument.
    """

    factor: int
    symbol: str | None
    divisor: int | str = 1

    @property
    def plain(self) -> bool:
        """Whether it can give its symbol a value."""
        return self.symbol in SYMBOLS and self.divisor == 1


def is_ladder(edges: Sequence[int], least: int = 1) -> bool:
    """Whether these are upper edges of buckets: ascending, of at least `least`, and at least one."""
    return bool(edges) and list(edges) == sorted(set(edges)) and edges[0] >= least


def _value_faults(name: str, values: Sequence[object] | None) -> Iterator[str]:
    if values is not None and (not 1 <= len(values) <= MAX_VALUES or len(set(values)) != len(values)):
        yield f"{name} lists {tuple(values)}; it takes 1 to {MAX_VALUES} different values"


def declare(arg: Arg, aliases: Iterator[str], trailing: bool) -> str:
    """An argument in a torch schema; `trailing`: it and all after it may have defaults."""
    if isinstance(arg, TensorArg):
        mark = "Tensor" + (f"({next(aliases)}!)" if arg.mutated else "") + ("?" if arg.optional else "")
        return f"{mark} {arg.name}" + ("=None" if trailing else "")
    if isinstance(arg, FloatArg):
        return f"float {arg.name}"
    if isinstance(arg, NoneArg):
        return f"{arg.type} {arg.name}" + ("=None" if trailing else "")
    if isinstance(arg, StrArg):
        return f"str {arg.name}" + (f'="{arg.default}"' if arg.default is not None and trailing else "")
    kind = "bool" if isinstance(arg, BoolArg) else "int"
    return f"{kind} {arg.name}" + (f"={arg.default}" if arg.default is not None and trailing else "")


def has_default(arg: Arg) -> bool:
    """Whether a call may leave the argument out."""
    if isinstance(arg, TensorArg):
        return arg.optional
    return isinstance(arg, NoneArg) or (isinstance(arg, (IntArg, BoolArg, StrArg)) and arg.default is not None)


def _is_utf8(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:  # half a character
        return False
    return True


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.bfloat16` -> "bfloat16"."""
    return str(dtype).removeprefix("torch.")


@functools.cache
def parse_dim(dim: str | int) -> Dim:
    """4 -> (4, None); "M" -> (1, "M"); "2*N" -> (2, "N"); "K/128" -> (1, "K", 128); "*" -> any size."""
    if isinstance(dim, int):
        return Dim(dim, None)
    if dim == "*":
        return Dim(1, "*")
    whole, slash, by = dim.partition("/")
    factor, _, symbol = whole.rpartition("*")
    good = symbol in SYMBOLS and not (factor and not (factor.isdigit() and int(factor) > 0))
    if not good or (slash and not (by.isidentifier() or (by.isdigit() and int(by) > 0))):
        raise HdispatchError(
            f"dimension {dim!r} is not SYMBOL, FACTOR*SYMBOL, either of them /DIVISOR, or *, with SYMBOL one of {SYMBOLS}"
        )
    return Dim(int(factor or 1), symbol, (int(by) if by.isdigit() else by) if slash else 1)
