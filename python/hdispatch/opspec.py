"""What an op is: its arguments, sizes, variants, torch reference and sample inputs.

An op is declared once, in `kernels/<op>/spec.py`, as an `OpSpec` named `SPEC`. Everything else is derived from it: the
argument checks and the key of the C++ doors, the torch schema and the fake implementation, the fallback, the variants
that the build wing compiles, the inputs of tests, benchmarks and tuning. Adding an op adds no C++.

Sizes. `TensorArg.dims` gives one entry per dimension: an int (the size is exactly that), or a symbol with an optional
integer factor, `"M"` or `"2*N"`. The symbols are `M` (the dynamic one, bucketed), `K` and `N` (exact, part of the key).
A symbol is bound by the first tensor that is not mutated and not optional and carries it, in argument order; every
other occurrence is checked against it. A symbol that no argument carries is 0 in the key.

Strides. The last dimension is contiguous, always. A tensor is contiguous unless `row_strided` is set: then the stride
of its first dimension is free (at least its width).

Variants. The dtypes of the tensors and the pattern of absent optional arguments are compiled in. `dtypes` of an
argument are alternatives; an argument that says `dtypes="input"` has the dtype of the argument of that name.
"""

from __future__ import annotations

import itertools
import keyword
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .errors import HdispatchError

#: Symbols that `TensorArg.dims` may use, in the order of the C++ `Symbol` enumeration.
SYMBOLS = ("M", "K", "N")


@dataclass(frozen=True)
class TensorArg:
    """A tensor argument. `dims` and `dtypes` as in the module's text; `mutated` means that the op writes it."""

    name: str
    dims: tuple[str | int, ...]
    dtypes: tuple[torch.dtype, ...] | str
    mutated: bool = False
    optional: bool = False
    row_strided: bool = False


@dataclass(frozen=True)
class FloatArg:
    """A Python float, finite and at least `minimum`; it reaches the kernel as float32 and is not compiled in."""

    name: str
    minimum: float = float("-inf")


Arg = TensorArg | FloatArg


@dataclass(frozen=True)
class Variant:
    """One combination of dtypes and absent optional arguments. `name` is unique within its op."""

    name: str
    #: dtype of each tensor argument by name; absent optional arguments are not in it.
    dtypes: dict[str, torch.dtype] = field(hash=False)
    #: names of the optional arguments that are None.
    none: frozenset[str]


@dataclass(frozen=True)
class OpSpec:
    """An op. `reference` and `sample` take part in tests and, the former, in serving: it is the fallback.

    reference(*args) -> None    the op in plain torch on whatever device the arguments are on, writing the mutated ones;
                                same arguments and order as the op.
    sample(variant, sizes, device, generator) -> list
                                random arguments of a variant, `sizes` like {"M": 16, "K": 4096}; mutated arguments
                                that are not read are poisoned. `row_strided` inputs come contiguous.
    shapes                      the (K, N) combinations that are built, as {"K": 4096} or {"N": 12288}.
    ladder                      upper edges of the buckets of M, ascending; the last bucket has no upper end.
    config_key                  names in the config files' keys -> symbols, e.g. {"hidden_size": "K", "num_tokens": "M"}.
    """

    name: str
    args: tuple[Arg, ...]
    reference: Callable[..., None]
    sample: Callable[[Variant, dict[str, int], torch.device, torch.Generator], list[Any]]
    shapes: tuple[dict[str, int], ...]
    config_key: dict[str, str]
    ladder: tuple[int, ...] = tuple(2**i for i in range(14))
    doc: str = ""

    def __post_init__(self) -> None:
        """Refuse a declaration that cannot be dispatched."""
        names = [arg.name for arg in self.args]
        for name in (self.name, *names):
            if not name.isidentifier() or keyword.iskeyword(name) or name.startswith("_"):
                raise HdispatchError(f"{self.name}: {name!r} is not a name that Python and torch's schemas take")
        if len(set(names)) != len(names):
            raise HdispatchError(f"{self.name}: argument names repeat: {names}")
        if list(self.ladder) != sorted(set(self.ladder)) or not self.ladder or self.ladder[0] < 1:
            raise HdispatchError(f"{self.name}: ladder {self.ladder} is not a list of ascending edges of at least 1")
        sources = {arg.name for arg in self.tensors() if not isinstance(arg.dtypes, str)}
        for arg in self.tensors():
            for dim in arg.dims:
                if isinstance(dim, str):
                    parse_dim(dim)
            if isinstance(arg.dtypes, str) and arg.dtypes not in sources:
                raise HdispatchError(
                    f"{self.name}: {arg.name} has the dtype of {arg.dtypes!r}, no tensor with dtypes of its own"
                )
        bound = {s for arg in self.tensors() if not arg.mutated and not arg.optional for s in _symbols(arg)}
        unbound = {s for arg in self.tensors() for s in _symbols(arg)} - bound | {"M"} - bound
        if unbound:
            raise HdispatchError(f"{self.name}: sizes {sorted(unbound)} are carried by no tensor that is read and required")

    def tensors(self) -> Iterator[TensorArg]:
        """The tensor arguments in order."""
        return (arg for arg in self.args if isinstance(arg, TensorArg))

    def schema(self) -> str:
        """The torch schema, without the namespace: `name(Tensor(a!) result, …, Tensor? scale_ub=None) -> ()`.

        Optional arguments default to None where no required one follows them.
        """
        parts, alias = [], iter("abcdefghijklmnopqrstuvwxyz")
        for index, arg in enumerate(self.args):
            if isinstance(arg, FloatArg):
                parts.append(f"float {arg.name}")
                continue
            mark = "Tensor" + (f"({next(alias)}!)" if arg.mutated else "") + ("?" if arg.optional else "")
            trailing = all(isinstance(rest, TensorArg) and rest.optional for rest in self.args[index:])
            parts.append(f"{mark} {arg.name}" + ("=None" if trailing else ""))
        return f"{self.name}({', '.join(parts)}) -> ()"

    def variants(self) -> list[Variant]:
        """Every variant: the product of the dtype alternatives and of the presence of each optional argument.

        A name reads `bfloat16`, or `bfloat16+residual` where optional arguments are present.
        """
        free = [(arg.name, arg.dtypes) for arg in self.tensors() if not isinstance(arg.dtypes, str)]
        optional = [arg.name for arg in self.tensors() if arg.optional]
        found = []
        for present in itertools.product((False, True), repeat=len(optional)):
            none = frozenset(name for name, here in zip(optional, present, strict=True) if not here)
            for choice in itertools.product(*(alternatives for _, alternatives in free)):
                chosen = {name: dtype for (name, _), dtype in zip(free, choice, strict=True)}
                dtypes = {arg.name: chosen[arg.dtypes if isinstance(arg.dtypes, str) else arg.name] for arg in self.tensors()}
                varied = [dtype_name(chosen[name]) for name, alternatives in free if len(alternatives) > 1]
                name = "+".join(["-".join(varied) or "any", *(o for o in optional if o not in none)])
                found.append(Variant(name, {n: d for n, d in dtypes.items() if n not in none}, none))
        return found

    def variant_dtypes(self) -> dict[str, dict[str, str]]:
        """Every variant as manifests and the C++ door have it: name -> argument -> dtype name, absent arguments missing."""
        return {v.name: {arg: dtype_name(dtype) for arg, dtype in v.dtypes.items()} for v in self.variants()}

    def variant(self, name: str) -> Variant:
        """The variant of that name."""
        for variant in self.variants():
            if variant.name == name:
                return variant
        raise HdispatchError(f"{self.name} has no variant {name!r}; it has {[v.name for v in self.variants()]}")

    def tensor_sizes(self, arg: TensorArg, sizes: dict[str, int]) -> list[int]:
        """The sizes of an argument for given symbols."""
        return [dim if isinstance(dim, int) else parse_dim(dim)[0] * sizes[parse_dim(dim)[1]] for dim in arg.dims]


def _symbols(arg: TensorArg) -> set[str]:
    return {parse_dim(dim)[1] for dim in arg.dims if isinstance(dim, str)}


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.bfloat16` -> "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def parse_dim(dim: str) -> tuple[int, str]:
    """`"M"` -> (1, "M"); `"2*N"` -> (2, "N")."""
    factor, _, symbol = dim.rpartition("*")
    if symbol not in SYMBOLS or (factor and not (factor.isdigit() and int(factor) > 0)):
        raise HdispatchError(f"dimension {dim!r} is not SYMBOL or FACTOR*SYMBOL with SYMBOL one of {SYMBOLS}")
    return int(factor or 1), symbol


def bucket_index(ladder: Sequence[int], m: int) -> int:
    """Index of the bucket that serves M = m: the first edge at or above it, else the last. The C++ ladder agrees (tested)."""
    return next((i for i, edge in enumerate(ladder) if m <= edge), len(ladder) - 1)
