"""Declaration of an op: its arguments, sizes, variants, torch reference and sample inputs.

An op is declared once, in `kernels/<op>/spec.py`, as an `OpSpec` named `SPEC`. Everything else is derived from it: the
argument checks and the key of the C++ doors, the torch schema and the fake implementation, the fallback, the variants
that the build wing compiles, the inputs of tests, benchmarks and tuning. Adding an op adds no C++.

Sizes. `TensorArg.dims` gives one entry per dimension:

    4, "M", "2*N"          the size is exactly that; symbols are `M` (the dynamic one, bucketed), `K` and `N`, and, for ops with
                           more sizes, `A` and `B`, which any call may have: no row is for some of them alone
    "K/128", "K/group"     K divided by a number, or by the static integer argument of that name, rounded up
    "*"                    any size

A symbol is bound by the first tensor that carries it plainly, in argument order: among those that are required and only
read, else among the required ones, else among the optional ones (then it is 0 where that one is absent). Every other
occurrence is checked against it. A symbol that no argument carries is 0 in the key.

Variants. What is compiled in: the dtypes of the tensors, the pattern of absent optional arguments, and the values of
integers, flags and strings that list their `values`. `dtypes` of an argument are alternatives; an argument that says
`dtypes="input"` has the dtype of the argument of that name. A value that is not listed is a miss, not an error.
"""

from __future__ import annotations

import itertools
import keyword
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from .errors import BundleError, HdispatchError
from .ladders import Ladders
from .manifest import OpEntry
from .op_args import (
    CALL_SYMBOLS,
    KEY_SYMBOLS,
    MAX_ARGS,
    SYMBOLS,
    Arg,
    BoolArg,
    Dim,
    FloatArg,
    IntArg,
    Layout,
    NoneArg,
    Static,
    StrArg,
    TensorArg,
    declare,
    dtype_name,
    has_default,
    is_ladder,
    parse_dim,
)

if TYPE_CHECKING:
    from .models import Model

__all__ = [
    "CALL_SYMBOLS",
    "HINTS",
    "KEY_SYMBOLS",
    "SYMBOLS",
    "WORKSPACE_COUNTERS",
    "Arg",
    "BoolArg",
    "Fallback",
    "FloatArg",
    "Form",
    "IntArg",
    "Layout",
    "NoneArg",
    "OpSpec",
    "Sizes",
    "Static",
    "StrArg",
    "TensorArg",
    "Variant",
    "VllmOp",
    "WorkspaceArg",
    "dtype_name",
    "parse_dim",
]

#: Sizes of a row, as {"K": 4096}: what is left out is open.
Sizes = dict[str, int]

#: Example sizes used to trace a symbol whose value is not compiled in: distinct, and multiples of all that kernels divide by.
HINTS = {"K": 4096, "N": 6144, "A": 7, "B": 11}

#: The first bytes of every workspace are counters.
WORKSPACE_COUNTERS = 2**16


@dataclass(frozen=True)
class WorkspaceArg:
    """Memory of the runtime's that an op's kernels get: one block per device and stream, zeroed once, shared by all ops.

    It is no argument of the op: the host function gets it after the op's arguments, as a uint8 tensor at an address that is a
    multiple of 256, of which it makes views (`workspace[WORKSPACE_COUNTERS:].view(torch.float32)`); the fallback does not.

    workspace[:WORKSPACE_COUNTERS]   counters, the same ones for every op: zero when a kernel begins, and to be left at zero
    workspace[WORKSPACE_COUNTERS:]   `bytes` bytes, which hold anything when a kernel begins: written before they are read

    bytes    the same for every call of a variant; or what says so of each: 0 for counters alone, None for no workspace
    """

    name: str
    bytes: int | Callable[[Variant], int | None]


@dataclass(frozen=True)
class Fallback:
    """The function for calls that no row serves, instead of the reference.

    function       takes the op's arguments, all that the schema does
    beyond_ladder  whether all Ms past the ladder's last edge are its: the last bucket then ends at its edge
    """

    function: Callable[..., None]
    beyond_ladder: bool = False


FormName = Literal["rows", "columns", "packed", "either"]


@dataclass(frozen=True)
class Form:
    """Where vLLM's kernel presumes how a matrix lies in memory, and ours reads its strides.

    "rows": contiguous. "columns": columns contiguous, with any distance between them; "packed": with none. "either": as the
    strides say. With `flag`, the name of a flag: `form` where it is set, rows where it is not. Other calls are misses.
    """

    arg: str
    form: FormName
    flag: str | None = None


@dataclass(frozen=True)
class VllmOp:
    """An op of vLLM's, `torch.ops.<namespace>.<op>`, whose calls an op serves: the same arguments in the same order.

    The last argument may be in one of the two only. Several ops may serve one: the first, by name, that takes a call.

    padded  names of tensors that may have more rows than the tensor `rows`: vLLM's kernel leaves the rest. M is the first
            dimension of all of them
    """

    op: str
    forms: tuple[Form, ...] = ()
    namespace: str = "_C"
    padded: tuple[str, ...] = ()
    rows: str | None = None


@dataclass(frozen=True)
class Variant:
    """One combination of dtypes, absent optional arguments and static values. `name` is unique within its op."""

    name: str
    #: dtype of each tensor argument by name; absent optional arguments are not in it.
    dtypes: dict[str, torch.dtype] = field(hash=False)
    #: names of the optional arguments that are None.
    none: frozenset[str]
    #: value of each argument that is compiled in, by name.
    static: dict[str, Static] = field(hash=False, default_factory=dict)


@dataclass(frozen=True)
class OpSpec:
    """An op. `reference` and `sample` take part in tests and, the former, in serving: it is the fallback.

    reference(*args) -> None    the op in plain torch on whatever device the arguments are on, writing the mutated ones;
                                same arguments and order as the op. Its docstring is the op's.
    sample(variant, sizes, device, generator) -> list
                                random arguments of a variant, `sizes` like {"M": 16, "K": 4096}; mutated arguments
                                that are not read are poisoned. Inputs with free strides come contiguous. Of an op with a
                                second ladder, `sizes` has its integer too, {"max_seq_len": 512}, where buckets are measured
                                or traced; elsewhere it may be missing.
    shapes                      the (K, N) combinations that get rows, as {"K": 4096}. A symbol that is left out makes rows
                                that serve every size of it; the kernel's module then says that it is GENERIC in it.
    calls(model) -> dict        the sizes of the rows that a model calls, by label, as {"hidden": {"K": 4096}}: what
                                `build --models` and `tune all` make, and the names of sizes in benchmarks. None: rows that
                                serve every size.
    ladder                      upper edges of the buckets of M, ascending; the last bucket has no upper end.
    config_key                  names in the config files' keys -> symbols, e.g. {"hidden_size": "K", "num_tokens": "M"}; and
                                -> the argument with a second ladder, {"max_seq_len": "max_seq_len"}.
    foreign_key                 a key of vLLM's files, which has other names -> the one with those of config_key; other keys
                                as they are.
    served                      which variants a bundle holds; all if None.
    typical                     the variant that servers call most: what is tuned and benchmarked unless told otherwise; the
                                first served one if None.
    accumulation                root mean square of what the kernels' sums over `summed` lose besides roundings of the output,
                                per square root of that size and relative to the output's own; 0 where nothing is added up, or
                                in float32 for an output of 16 bits.
    summed                      the size that sums are over, where there is an `accumulation`.
    own_scales                  whether the rows of the outputs have scales of their own, as averages over many or few tokens
                                have: where sums cancel, a row's scale says what rounding may lose.
    hints                       example sizes used to trace generic symbols; `HINTS` for the others.
    measured                    variant -> sizes to measure its candidates at, of symbols that rows leave open; `hints` for the
                                others.
    mixes                       kinds of calls that candidates are measured with in turn: what `sizes` of a sample has besides,
                                as ({}, {"equal": 1}); results are checked with the first one.
    vllm                        the op of vLLM's that `override_vllm_ops` lets it serve; see `VllmOp`.
    workspace                   memory of the runtime's that the kernels get; see `WorkspaceArg`.
    fallback                    what serves calls that no row does; `reference` if None. See `Fallback`.
    """

    name: str
    args: tuple[Arg, ...]
    reference: Callable[..., None]
    sample: Callable[[Variant, dict[str, int], torch.device, torch.Generator], list[Any]]
    shapes: tuple[dict[str, int], ...]
    config_key: dict[str, str]
    calls: Callable[[Model], Mapping[str, Sizes]] | None = None
    ladder: tuple[int, ...] = tuple(2**i for i in range(14))
    served: Callable[[Variant], bool] | None = None
    typical: str | None = None
    accumulation: float = 0.0
    summed: str = "K"
    own_scales: bool = False
    hints: Mapping[str, int] = field(default_factory=dict)
    measured: Callable[[Variant], Mapping[str, int]] | None = None
    mixes: tuple[Mapping[str, int], ...] = ({},)
    fallback: Fallback | None = None
    foreign_key: Callable[[dict[str, int]], dict[str, int]] | None = None
    workspace: WorkspaceArg | None = None
    vllm: VllmOp | None = None

    def __post_init__(self) -> None:
        """Refuse a declaration that cannot be dispatched."""
        names = [arg.name for arg in self.args]
        names += [self.workspace.name] if self.workspace is not None else []
        for name in (self.name, *names):
            if not name.isidentifier() or keyword.iskeyword(name) or name.startswith("_"):
                raise HdispatchError(f"{self.name}: {name!r} is not a name that Python and torch's schemas take")
        if len(set(names)) != len(names):
            raise HdispatchError(f"{self.name}: argument names repeat: {names}")
        if not is_ladder(self.ladder):
            raise HdispatchError(f"{self.name}: ladder {self.ladder} is not a list of ascending edges of at least 1")
        if len(self.args) > MAX_ARGS:
            raise HdispatchError(f"{self.name}: {len(self.args)} arguments; an op takes at most {MAX_ARGS}")
        for arg in self.args:
            for fault in arg.faults():
                raise HdispatchError(f"{self.name}: {fault}")
        self._check_second_ladder()
        for tensor in self.tensors():
            self._check_names(tensor)
        self._check_returned()
        unbound = {s for arg in self.tensors() for s in arg.symbols()} | {"M"}
        unbound -= {s for s in SYMBOLS if self.binder(s) is not None}
        if unbound:
            raise HdispatchError(f"{self.name}: no tensor carries the sizes {sorted(unbound)} plainly")
        binder = self.binder("M")
        if binder is not None and binder[0].optional:
            raise HdispatchError(f"{self.name}: only {binder[0].name}, which may be None, carries M")
        if self.vllm is not None:
            self._check_vllm(self.vllm)

    def _check_vllm(self, served: VllmOp) -> None:
        """The arguments that the op of vLLM's names."""
        tensors = {arg.name: arg for arg in self.tensors()}
        flags = [arg.name for arg in self.args if isinstance(arg, BoolArg)]
        for form in served.forms:
            matrices = [arg.name for arg in tensors.values() if len(arg.dims) == 2]
            if form.arg not in matrices:
                raise HdispatchError(f"{self.name}: vllm has a form of {form.arg!r}; it takes a matrix, one of {matrices}")
            if form.form not in get_args(FormName):
                raise HdispatchError(f"{self.name}: vllm has the form {form.form!r}; it takes one of {get_args(FormName)}")
            if form.flag is not None and form.flag not in flags:
                raise HdispatchError(f"{self.name}: vllm has the flag {form.flag!r}; it takes one of {flags}")
        if type(served.padded) is not tuple:
            raise HdispatchError(f"{self.name}: vllm has padded={served.padded!r}; it takes a tuple of tensors' names")
        if bool(served.padded) != (served.rows is not None):
            raise HdispatchError(
                f"{self.name}: vllm has padded={served.padded!r} and rows={served.rows!r}; it takes both: rows is the tensor "
                "that has the rows of a call"
            )
        with_rows = [arg.name for arg in tensors.values() if arg.dims and arg.dims[0] == "M"]
        for name in served.padded:
            if name not in with_rows or name == served.rows:
                others = [each for each in with_rows if each != served.rows]
                raise HdispatchError(
                    f"{self.name}: vllm has padded={name!r}{self._dims_of(name)}; it takes tensors whose first dimension is M, "
                    f"of {others}"
                )
        required = [name for name in with_rows if not tensors[name].optional]
        if served.rows is not None and served.rows not in required:
            raise HdispatchError(
                f"{self.name}: vllm has rows={served.rows!r}{self._dims_of(served.rows)}; it takes a tensor that is always "
                f"there and whose first dimension is M, one of {required}"
            )

    def _dims_of(self, name: str) -> str:
        """` of the dimensions …` of a tensor; nothing for what is none."""
        return next((f" of the dimensions {arg.dims}" for arg in self.tensors() if arg.name == name), "")

    def _check_returned(self) -> None:
        """What the op returns comes behind what it takes, and its sizes from that."""
        returned = self.returned
        if tuple(self.args[len(self.args) - len(returned) :]) != returned or len(returned) == len(self.args):
            raise HdispatchError(
                f"{self.name}: {[arg.name for arg in returned]} are returned; they come behind all other arguments"
            )
        for arg in returned:
            for symbol in sorted(arg.symbols()):
                binder = self.binder(symbol)
                if binder is None or binder[0].returned or binder[0].optional:
                    raise HdispatchError(
                        f"{self.name}: {arg.name} is returned, but no required argument carries {symbol} plainly"
                    )
            if isinstance(arg.dtypes, str) and next(a for a in self.tensors() if a.name == arg.dtypes).optional:
                raise HdispatchError(f"{self.name}: {arg.name} is returned; {arg.dtypes}, whose dtype it has, may be None")

    def _check_second_ladder(self) -> None:
        found = [arg for arg in self.args if isinstance(arg, IntArg) and arg.ladder is not None]
        if len(found) > 1:
            raise HdispatchError(f"{self.name}: {found[0].name} and {found[1].name} have ladders; one integer may")
        unknown = set(self.config_key.values()) - {*KEY_SYMBOLS, *(arg.name for arg in found)}
        if unknown:
            raise HdispatchError(f"{self.name}: config_key names {sorted(unknown)}, no size and no argument with a ladder")

    def _check_names(self, arg: TensorArg) -> None:
        """The arguments that a tensor's declaration names."""
        sources = {other.name for other in self.tensors() if not isinstance(other.dtypes, str)}
        if isinstance(arg.dtypes, str) and arg.dtypes not in sources:
            raise HdispatchError(f"{self.name}: {arg.name} has the dtype of {arg.dtypes!r}, no tensor that lists dtypes")
        static = {other.name for other in self.static_args() if not isinstance(other, StrArg)}
        for dim in arg.dims:
            divisor = parse_dim(dim).divisor
            if isinstance(divisor, str) and divisor not in static:
                raise HdispatchError(
                    f"{self.name}: {arg.name} has the dimension {dim!r}, but {divisor!r} is no integer argument with values"
                )
        if arg.in_place is not None and not (arg.mutated and arg.in_place in {other.name for other in self.tensors()}):
            raise HdispatchError(f"{self.name}: {arg.name}: in_place takes the name of a tensor, and that it is written")

    def tensors(self) -> Iterator[TensorArg]:
        """The tensor arguments in order."""
        return (arg for arg in self.args if isinstance(arg, TensorArg))

    def static_args(self) -> list[IntArg | BoolArg | StrArg]:
        """The arguments whose values are compiled in, in order."""
        return [arg for arg in self.args if isinstance(arg, (IntArg, BoolArg, StrArg)) and arg.values is not None]

    def workspace_bytes(self, variant: Variant) -> int:
        """Bytes of the workspace of a variant's kernels, counters included; 0: none. HdispatchError unless it is a size."""
        if self.workspace is None:
            return 0
        size = self.workspace.bytes
        found = size if isinstance(size, int) else size(variant)
        if found is None:
            return 0
        if not isinstance(found, int) or not 0 <= found < 2**48:
            raise HdispatchError(f"{self.name}: {self.workspace.name} of {variant.name} is {found!r} bytes; it takes 0 or more")
        return WORKSPACE_COUNTERS + found

    def make_workspace(self, variant: Variant, device: torch.device) -> list[torch.Tensor | None]:
        """The arguments that a host function takes after the op's, for a call without the runtime; [] for most ops."""
        if self.workspace is None:
            return []
        size = self.workspace_bytes(variant)
        return [torch.zeros(size, dtype=torch.uint8, device=device) if size else None]

    def entry(self, variants: Sequence[str] | None = None) -> OpEntry:
        """The op as a manifest has it, with all variants or those named."""
        chosen = [v for v in self.variants() if variants is None or v.name in variants]
        arguments = self.variant_arguments()
        entry: OpEntry = {
            "schema": self.schema(),
            "ladder": list(self.ladder),
            "variants": {v.name: arguments[v.name] for v in chosen},
        }
        if self.second is not None:
            entry["second"] = {"arg": self.second.name, "ladder": list(self.second.ladder or ())}
        if self.workspace is not None:
            entry["workspace"] = {"arg": self.workspace.name, "bytes": {v.name: self.workspace_bytes(v) for v in chosen}}
        return entry

    def difference(self, entry: OpEntry) -> str | None:
        """How an op in a manifest differs from this one; None if it does not. The edges of ladders may differ."""
        mine = self.entry(list(entry["variants"]))
        for name in ("schema", "variants", "workspace"):
            if entry.get(name) != mine.get(name):
                return f"{entry.get(name)} and not {mine.get(name)}" if name != "variants" else "other variants or arguments"
        theirs, ours = entry.get("second"), mine.get("second")
        if (theirs and theirs["arg"]) != (ours and ours["arg"]):
            return f"a second ladder of {theirs and theirs['arg']} and not of {ours and ours['arg']}"
        return None

    def check_same(self, entry: OpEntry, where: object, remedy: str) -> None:
        """`BundleError` if the op in the manifest `where` is another than this one; `remedy` says what to do then."""
        if (other := self.difference(entry)) is not None:
            raise BundleError(
                f"{where}: built for {entry['schema']}; the installed op is {self.schema()} "
                f"with other variants or arguments ({other}); {remedy}"
            )

    @property
    def fallback_function(self) -> Callable[..., None]:
        """The function for calls that no row serves."""
        return self.reference if self.fallback is None else self.fallback.function

    @property
    def is_closed(self) -> bool:
        """Whether the last bucket of M ends at its edge."""
        return self.fallback is not None and self.fallback.beyond_ladder

    @cached_property
    def second(self) -> IntArg | None:
        """The integer argument with a ladder of its own, if there is one."""
        return next((arg for arg in self.args if isinstance(arg, IntArg) and arg.ladder is not None), None)

    @cached_property
    def ladders(self) -> Ladders:
        """The op's buckets."""
        second = self.second
        return Ladders(self.ladder) if second is None else Ladders(self.ladder, second.name, second.ladder or ())

    def binder(self, symbol: str) -> tuple[TensorArg, int] | None:
        """The tensor and the dimension that give a symbol its value; None if nothing carries it."""
        return self._binders.get(symbol)

    @cached_property
    def _binders(self) -> dict[str, tuple[TensorArg, int]]:
        """By symbol. Found once: a build asks for them for every tensor of every call that it makes up."""
        found: dict[str, tuple[TensorArg, int]] = {}
        for accept in (lambda a: not a.optional and not a.mutated, lambda a: not a.optional, lambda _: True):
            for arg in filter(accept, self.tensors()):
                for index, dim in enumerate(map(parse_dim, arg.dims)):
                    if dim.symbol is not None and dim.plain and not arg.broadcast:
                        found.setdefault(dim.symbol, (arg, index))
        return found

    def symbols(self) -> tuple[str, ...]:
        """The symbols that the op has, in the order of SYMBOLS."""
        return tuple(symbol for symbol in SYMBOLS if symbol in self._binders)

    @property
    def returned(self) -> tuple[TensorArg, ...]:
        """The tensors that the op allocates and returns, in order."""
        return tuple(arg for arg in self.tensors() if arg.returned)

    def functional_schema(self) -> str:
        """The torch schema of an op that returns tensors: `name(Tensor x, …) -> Tensor`, or `-> (Tensor, Tensor)`."""
        given = self.args[: len(self.args) - len(self.returned)]
        parts = [
            declare(arg, iter("abcdefghijklmnopqrstuvwxyz"), all(map(has_default, given[i:]))) for i, arg in enumerate(given)
        ]
        results = ", ".join("Tensor" for _ in self.returned)
        return f"{self.name}({', '.join(parts)}) -> {f'({results})' if len(self.returned) > 1 else results}"

    def schema(self) -> str:
        """The torch schema, without the namespace: `name(Tensor(a!) result, …, Tensor? scale_ub=None) -> ()`.

        Optional tensors default to None where only arguments with defaults follow them. Of an op that returns tensors, that of
        its overload "out", which takes them.
        """
        parts: list[str] = []
        aliases = itertools.chain("abcdefghijklmnopqrstuvwxyz", (f"a{number}" for number in itertools.count()))
        for index, arg in enumerate(self.args):
            parts.append(declare(arg, aliases, all(has_default(rest) for rest in self.args[index:])))
        return f"{self.name}{'.out' if self.returned else ''}({', '.join(parts)}) -> ()"

    def variants(self) -> list[Variant]:
        """Every variant: the product of dtype alternatives, presence of each optional argument and static values.

        A name reads `bfloat16`, `bfloat16+residual` where optional arguments are present, `bfloat16+group_size=64`,
        `bfloat16+is_neox` where a flag is set, `bfloat16+kv_cache_dtype=fp8` (a string with other than letters, digits and
        `_.-` as Python writes it).
        """
        return list(self._variants)

    @cached_property
    def _variants(self) -> tuple[Variant, ...]:
        """Made once: there are hundreds, and a build asks for those of each of its rows."""
        free = [(arg.name, arg.dtypes) for arg in self.tensors() if not isinstance(arg.dtypes, str)]
        optional = [arg.name for arg in self.tensors() if arg.optional]
        static: list[tuple[str, tuple[Static, ...]]] = [(arg.name, arg.values or ()) for arg in self.static_args()]
        found = []
        for present in itertools.product((False, True), repeat=len(optional)):
            none = frozenset(name for name, here in zip(optional, present, strict=True) if not here)
            for values in itertools.product(*(alternatives for _, alternatives in static)):
                fixed = dict(zip((name for name, _ in static), values, strict=True))
                for choice in itertools.product(*(alternatives for _, alternatives in free)):
                    chosen = {name: dtype for (name, _), dtype in zip(free, choice, strict=True)}
                    found.append(self._variant(chosen, none, fixed))
        return tuple(found)

    def _variant(self, chosen: dict[str, torch.dtype], none: frozenset[str], static: dict[str, Static]) -> Variant:
        dtypes = {arg.name: chosen[arg.dtypes if isinstance(arg.dtypes, str) else arg.name] for arg in self.tensors()}
        varied = [
            dtype_name(chosen[arg.name])
            for arg in self.tensors()
            if not isinstance(arg.dtypes, str) and len(arg.dtypes) > 1 and arg.name not in none
        ]
        present = [arg.name for arg in self.tensors() if arg.optional and arg.name not in none]
        values = [
            name if value is True else f"{name}={_shown(value)}"
            for name, value in static.items()
            if value is not False and len(next(a.values or () for a in self.static_args() if a.name == name)) > 1
        ]
        name = "+".join(["-".join(varied) or "any", *present, *values])
        return Variant(name, {n: d for n, d in dtypes.items() if n not in none}, none, static)

    def served_variants(self) -> list[Variant]:
        """The variants that a bundle holds."""
        return [variant for variant in self.variants() if self.served is None or self.served(variant)]

    def typical_variant(self) -> Variant:
        """The variant that is tuned and benchmarked unless told otherwise."""
        served = self.served_variants()
        if self.typical is None:
            return served[0]
        for variant in served:
            if variant.name == self.typical:
                return variant
        raise HdispatchError(f"{self.name}: typical is {self.typical!r}; bundles hold {[v.name for v in served]}")

    def variant_arguments(self) -> dict[str, dict[str, str | int]]:
        """Every variant as manifests and the C++ door have it: name -> argument -> dtype name, or static value.

        Absent arguments are missing; flags are 0 and 1.
        """
        return {
            v.name: {
                **{arg: dtype_name(dtype) for arg, dtype in v.dtypes.items()},
                **{arg: value if isinstance(value, str) else int(value) for arg, value in v.static.items()},
            }
            for v in self.variants()
        }

    def variant(self, name: str) -> Variant:
        """The variant of that name."""
        for variant in self._variants:
            if variant.name == name:
                return variant
        raise HdispatchError(f"{self.name} has no variant {name!r}; it has {[v.name for v in self._variants]}")

    def row_shape(self, variant: str, shape: Mapping[str, int]) -> dict[str, int]:
        """The sizes in a row's key: those of the shape that calls of the variant have. Only an absent tensor may carry one."""
        none = self.variant(variant).none
        binders = {symbol: self.binder(symbol) for symbol in shape}
        return {symbol: size for symbol, size in shape.items() if (found := binders[symbol]) and found[0].name not in none}

    def tensor_sizes(self, arg: TensorArg, sizes: Mapping[str, Any], static: Mapping[str, Static] | None = None) -> list[Any]:
        """The sizes of an argument for given symbols and static values; -1 where any size will do."""

        def size(dim: Dim) -> Any:
            if dim.symbol is None:
                return dim.factor
            if dim.symbol == "*":
                return -1
            whole = dim.factor * sizes[dim.symbol]
            by = dim.divisor if isinstance(dim.divisor, int) else int((static or {})[dim.divisor])
            return whole if by == 1 else (whole + (by - 1)) // by

        return [size(parse_dim(dim)) for dim in arg.dims]

    def hint(self, symbol: str) -> int:
        """The example size used to trace a symbol whose value is not compiled in."""
        return self.hints.get(symbol, HINTS[symbol])


def _shown(value: Static) -> str:
    """A value in a variant's name."""
    plain = not isinstance(value, str) or re.fullmatch(r"[A-Za-z0-9_.\-]+", value)
    return str(value) if plain else ascii(value)
