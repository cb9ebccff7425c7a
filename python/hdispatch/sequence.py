"""Many launches made by one call: a sequence of ops over slots, constants and temporaries, built once.

    s = hdispatch.Sequence("half a layer")
    x = s.slot("x", ("M", 4096), torch.bfloat16)
    out = s.slot("out", ("M", 6144), torch.bfloat16, written=True)
    quantized, scales = s.temp(("M", 4096), torch.float8_e4m3fn), s.temp(("M", 1), torch.float32)
    s.add(ops.rms_norm_dynamic_per_token_quant, quantized, x, norm, scales, 1e-6, None, None)
    s.add(ops.scaled_mm, out, quantized, weight, scales, weight_scales, None)
    half = s.freeze()
    half(x_tensor, out_tensor)  # any number of rows

A size is an int, or depends on the rows M of a call: "M", "2*M", "M+1". Of a slot it may be "*": any.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from collections.abc import Sequence as Items
from typing import Any, NamedTuple

import torch

from . import _C, registry
from .errors import ArgumentError, HdispatchError
from .opspec import BoolArg, IntArg, OpSpec, TensorArg, dtype_name, parse_dim

Arena = _C.Arena

#: Rows for which an arena is made, where a sequence does not say.
MAX_ROWS = 1024

_DIM = re.compile(r"(?:(\d+)\*)?M(?:\+(\d+))?")


class Dim(NamedTuple):
    """A size or a position: per_row * M + constant."""

    per_row: int
    constant: int


def _dim(value: int | str, where: str) -> Dim | None:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return Dim(0, value)
    if value == "*":
        return None
    found = _DIM.fullmatch(value.replace(" ", "")) if isinstance(value, str) else None
    if not found:
        raise ArgumentError(f'{where}: {value!r} is no size; it takes an int, "M", "2*M" or "M+1"')
    return Dim(int(found[1] or 1), int(found[2] or 0))


def _sizes(values: Iterable[int | str], where: str) -> tuple[Dim, ...]:
    found = [_dim(value, where) for value in values]
    if None in found:
        raise ArgumentError(f'{where}: only a slot has a size "*"')
    return tuple(dim for dim in found if dim is not None)


class SequenceTensor:
    """A slot or temporary of a sequence, or a view of one, to be passed to `Sequence.add`. It has no memory.

    Views are those of torch, with sizes and positions that may depend on M.
    """

    def __init__(
        self, owner: Sequence, place: str, index: int, dims: tuple[Dim | None, ...] | None, views: tuple[Any, ...] = ()
    ) -> None:
        self._owner, self._place, self._index, self._dims, self._views = owner, place, index, dims, views

    def view(self, *sizes: int | str) -> SequenceTensor:
        """The same elements with other sizes; their strides must allow it, as in torch."""
        dims = _sizes(sizes, f"{self}.view")
        return self._with(dims, ("view", list(dims)))

    def narrow(self, dim: int, start: int | str, length: int | str) -> SequenceTensor:
        """`length` elements of a dimension, from `start` on."""
        at = self._dimension(dim)
        begin, size = _sizes((start, length), f"{self}.narrow")
        dims = self._known()
        return self._with((*dims[:at], size, *dims[at + 1 :]), ("narrow", at, begin, size))

    def transpose(self, dim0: int, dim1: int) -> SequenceTensor:
        """Two dimensions swapped."""
        a, b = self._dimension(dim0), self._dimension(dim1)
        dims = list(self._known())
        dims[a], dims[b] = dims[b], dims[a]
        return self._with(tuple(dims), ("transpose", a, b))

    def columns(self, start: int, stop: int) -> SequenceTensor:
        """Elements start..stop of the last dimension: the q of a buffer of q, k and v."""
        return self.narrow(len(self._known()) - 1, start, stop - start)

    def _known(self) -> tuple[Dim | None, ...]:
        if self._dims is None:
            raise ArgumentError(f"{self}: no view of a slot without dims; declare them")
        return self._dims

    def _dimension(self, dim: int) -> int:
        rank = len(self._known())
        if not -rank <= dim < rank:
            raise ArgumentError(f"{self}: dimension {dim} of rank {rank}")
        return dim % rank

    def _with(self, dims: tuple[Dim | None, ...], view: tuple[Any, ...]) -> SequenceTensor:
        self._known()
        return SequenceTensor(self._owner, self._place, self._index, dims, (*self._views, view))

    def __repr__(self) -> str:
        return f"<{self._place} {self._owner._label(self)} of sequence {self._owner.name}>"


class SequenceInteger:
    """An integer slot of a sequence, to be passed to `Sequence.add` in the place of an int or a flag."""

    def __init__(self, owner: Sequence, index: int, name: str) -> None:
        self._owner, self._index, self.name = owner, index, name


class SequenceResult:
    """The tensor that a foreign step returns: an argument of later foreign steps."""

    def __init__(self, owner: Sequence, step: int) -> None:
        self._owner, self._step = owner, step


class Sequence:
    """Describes a sequence; `freeze` makes it a callable. Sizes and dtypes are checked when it is called.

    name       for errors and `stats`, which counts it under this name; not that of an op
    max_rows   rows of the arena. A call of more rows makes steps that work by rows in chunks of at most so many
    arena  memory of temporaries; default one of its own. Sequences that run one after the other on a stream may share one
    """

    def __init__(self, name: str, *, max_rows: int = MAX_ROWS, arena: Arena | None = None) -> None:
        if not name or name in registry.names():
            raise ArgumentError(f"a sequence is named {name!r}; it takes a name that no op has")
        self.name, self.max_rows = name, max_rows
        self.arena = Arena() if arena is None else arena
        self._slots: list[tuple[str, Any, str | None, bool, bool, bool]] = []
        self._temps: list[tuple[list[Dim], str]] = []
        self._steps: list[dict[str, Any]] = []
        self._filled: set[int] = set()  # temporaries that a step has written
        self._frozen: _C.Sequence | None = None

    # ---- what steps work on ----

    def slot(
        self,
        name: str,
        dims: Items[int | str] | None,
        dtype: torch.dtype | None,
        *,
        written: bool = False,
        optional: bool = False,
    ) -> SequenceTensor:
        """A tensor that each call gives, in the order of declaration or by name.

        dims      None: any rank and sizes; then foreign steps alone take it, and no views of it
        dtype     None: any
        written   whether a step writes it
        optional  whether None may be given
        """
        found = None if dims is None else tuple(_dim(dim, f"sequence {self.name}: slot {name}") for dim in dims)
        self._add_slot(name, None if found is None else list(found), dtype and dtype_name(dtype), True, written, optional)
        return SequenceTensor(self, "slot", len(self._slots) - 1, found)

    def int_slot(self, name: str) -> SequenceInteger:
        """An integer, or a flag, that each call gives."""
        self._add_slot(name, None, None, False, False, False)
        return SequenceInteger(self, len(self._slots) - 1, name)

    def _add_slot(self, name: str, *rest: Any) -> None:
        self._open()
        if not name.isidentifier() or any(slot[0] == name for slot in self._slots):
            raise ArgumentError(f"sequence {self.name}: slot {name!r}: it takes an identifier that no other slot has")
        self._slots.append((name, *rest))

    def temp(self, dims: Items[int | str], dtype: torch.dtype) -> SequenceTensor:
        """A tensor of the arena, contiguous: its content matters from the first to the last step that has it."""
        self._open()
        sizes = _sizes(dims, f"sequence {self.name}: temporary {len(self._temps)}")
        self._temps.append((list(sizes), dtype_name(dtype)))
        return SequenceTensor(self, "temp", len(self._temps) - 1, sizes)

    # ---- steps ----

    def add(self, op: _C.Op | _C.FunctionalOp, *args: Any, by_rows: bool | None = None, **kwargs: Any) -> None:
        """A call of one of our ops with slots, temporaries and constants, positional or by name.

        Tensors among `args` are constants: their memory is bound now, and kept. A caller that replaces a tensor's memory makes
        a new sequence.

        An op that returns tensors takes them here, behind its arguments, as slots or temporaries.

        by_rows  whether each row of what it writes depends on that row alone of what it reads, besides constants; then many
                 rows may run in chunks. None: true where every tensor has M rows, as the op's M, or is a constant. Say False
                 for an op whose rows look at one another.
        """
        op = op.out if isinstance(op, _C.FunctionalOp) else op
        spec = registry.spec(op.name)
        where = self._where(op.name)
        given = _bind(where, [(arg.name, *_default(arg)) for arg in spec.args], args, kwargs)
        made = []
        for arg, value in zip(spec.args, given, strict=True):
            _check_kind(where, arg, value)
            made.append(self._argument(where, arg.name, value, isinstance(arg, TensorArg) and arg.mutated))
        if by_rows is None:
            by_rows = _works_by_rows(spec, given)
        self._add_step(op.name, op, None, made, by_rows)

    def add_torch(
        self, op: Any, *args: Any, by_rows: bool = False, writes: Items[str] = (), **kwargs: Any
    ) -> SequenceResult | None:
        """A call of any other op of torch's dispatcher, an overload as `torch.ops.aten.copy_.default`, from C++.

        It runs below autograd, without the GIL unless its kernel takes it. Returns what it returns, if that is a tensor: an
        argument of later foreign steps.

        by_rows  as in `add`
        writes   arguments that it writes and its schema does not mark
        """
        if not hasattr(op, "_schema"):
            raise ArgumentError(f"{self._where(str(op))}: it takes an overload, such as torch.ops.aten.copy_.default")
        schema = op._schema
        where = self._where(schema.name)
        wanted = [(a.name, a.has_default_value(), a.default_value) for a in schema.arguments]
        positional = sum(not a.kwarg_only for a in schema.arguments)
        if len(args) > positional:
            raise ArgumentError(f"{where}: got {len(args)} positional arguments; it takes {positional}: {schema}")
        given = _bind(where, wanted, args, kwargs)
        unknown = [name for name in writes if name not in {a.name for a in schema.arguments}]
        if unknown:
            raise ArgumentError(f"{where}: it is said to write {unknown[0]!r}, which is no argument: {schema}")
        made = []
        for arg, value in zip(schema.arguments, given, strict=True):
            if by_rows and isinstance(value, SequenceResult):
                raise ArgumentError(f"{where}: {arg.name} is the result of a foreign step, which has all rows: by_rows=False")
            written = arg.name in writes or (arg.alias_info is not None and arg.alias_info.is_write)
            made.append(self._argument(where, arg.name, value, written))
        overload = schema.name, schema.overload_name
        self._add_step(schema.name, None, overload, made, by_rows)
        returns = [str(each.type) for each in schema.returns]
        return SequenceResult(self, len(self._steps) - 1) if returns == ["Tensor"] and not by_rows else None

    def freeze(self) -> _C.Sequence:
        """The callable: takes the slots and returns None. The sequence takes no more steps."""
        if self._frozen is None:
            self._frozen = _C.make_sequence(self.name, self._slots, self._temps, self._steps, self.max_rows, self.arena)
        return self._frozen

    def _open(self) -> None:
        if self._frozen is not None:
            raise HdispatchError(f"sequence {self.name} is frozen")

    def _where(self, name: str) -> str:
        return f"sequence {self.name}, step {len(self._steps)} ({name})"

    def _label(self, tensor: SequenceTensor) -> str:
        return self._slots[tensor._index][0] if tensor._place == "slot" else str(tensor._index)

    def _add_step(
        self, name: str, op: _C.Op | None, overload: tuple[str, str] | None, args: list[tuple[Any, ...]], by_rows: bool
    ) -> None:
        self._open()
        for kind, index, *rest in args:
            if kind == "temp" and rest[1]:
                self._filled.add(index)
        made = [arg[:3] for arg in args]
        self._steps.append({"name": name, "op": op, "torch": overload, "args": made, "by_rows": by_rows})

    def _argument(self, where: str, name: str, value: Any, written: bool) -> tuple[Any, ...]:
        """As C++ takes it, with `written` behind for tensors."""
        if isinstance(value, SequenceTensor | SequenceInteger | SequenceResult) and value._owner is not self:
            raise ArgumentError(f"{where}: {name} is of another sequence, {value._owner.name}")
        if isinstance(value, SequenceResult):
            return "result", value._step, None
        if isinstance(value, SequenceInteger):
            return "integer", value._index, None
        if isinstance(value, torch.Tensor):
            return "value", value.detach() if value.requires_grad else value, written
        if not isinstance(value, SequenceTensor):
            return "value", value, written
        if value._place == "slot" and written and not self._slots[value._index][4]:
            raise ArgumentError(f"{where}: it writes {name}, which is {value}; declare the slot with written=True")
        if value._place == "temp" and not written and value._index not in self._filled:
            raise ArgumentError(f"{where}: it reads {name}, which is {value}; no step before it writes it")
        return value._place, value._index, list(value._views), written


def _check_kind(where: str, arg: Any, value: Any) -> None:
    """Refuse what the op's argument cannot be; C++ checks the values of the others."""
    if isinstance(value, SequenceResult):
        raise ArgumentError(f"{where}: {arg.name} is the result of a foreign step; copy it into a temporary first")
    if isinstance(value, SequenceInteger) and not isinstance(arg, IntArg | BoolArg):
        raise ArgumentError(f"{where}: {arg.name} is the integer slot {value.name}; it takes no int")
    if not isinstance(arg, TensorArg):
        if isinstance(value, SequenceTensor):
            raise ArgumentError(f"{where}: {arg.name} is {value}; it takes no tensor")
    elif not isinstance(value, SequenceTensor | torch.Tensor) and not (value is None and arg.optional):
        given = "None" if value is None else f"a {type(value).__name__}"
        raise ArgumentError(f"{where}: {arg.name} is {given}; it takes a tensor")


def _default(arg: Any) -> tuple[bool, Any]:
    """Whether an argument may be left out, and what it is then."""
    if isinstance(arg, TensorArg):
        return arg.optional, None
    default = getattr(arg, "default", None)
    return default is not None or (not hasattr(arg, "minimum") and not hasattr(arg, "values")), default


def _bind(where: str, wanted: list[tuple[str, bool, Any]], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """All arguments in order, from positional and named ones and (name, has default, default)."""
    names = [name for name, _, _ in wanted]
    if len(args) > len(wanted):
        raise ArgumentError(f"{where}: got {len(args)} arguments; it takes {len(wanted)}: {', '.join(names)}")
    given = dict(zip(names, args, strict=False))
    for name, value in kwargs.items():
        if name not in names or name in given:
            raise ArgumentError(f"{where}: argument {name!r} is {'given twice' if name in names else 'not known'}")
        given[name] = value
    missing = [name for name, optional, _ in wanted if name not in given and not optional]
    if missing:
        raise ArgumentError(f"{where}: argument {missing[0]!r} is missing; it takes {', '.join(names)}")
    return [given.get(name, default) for name, _, default in wanted]


def _works_by_rows(spec: OpSpec, given: list[Any]) -> bool:
    """Whether every tensor has the sequence's rows as the op's M, or is a constant; what it writes has rows."""
    for arg, value in zip(spec.args, given, strict=True):
        if not isinstance(arg, TensorArg) or value is None:
            continue
        if isinstance(value, torch.Tensor):
            if arg.mutated or _has_many_rows(arg, value):
                return False
            continue
        if not _has_rows(value) or not _rows_are_m(arg, value):
            return False
    return True


def _has_many_rows(arg: TensorArg, constant: torch.Tensor) -> bool:
    """Whether a constant has rows of the op's M, which it keeps where the other tensors have those of a chunk."""
    symbols = [parse_dim(dim).symbol for dim in arg.dims]
    return constant.dim() == len(symbols) and any(
        size > 1 and symbol == "M" for size, symbol in zip(constant.shape, symbols, strict=True)
    )


def _has_rows(tensor: SequenceTensor) -> bool:
    """Whether it is cut by rows where its slot or temporary is."""
    owner = tensor._owner
    dims = owner._slots[tensor._index][1] if tensor._place == "slot" else owner._temps[tensor._index][0]
    if dims is None:
        return False
    rows = [(at, dim) for at, dim in enumerate(dims) if dim is not None and dim.per_row]
    if len(rows) != 1 or rows[0][1].constant:
        return False
    for view in tensor._views:
        if view[0] == "narrow" and (view[2].per_row or view[3].per_row):
            return False
        if view[0] == "view" and rows[0][0] != 0:
            return False
    return True


def _rows_are_m(arg: TensorArg, tensor: SequenceTensor) -> bool:
    """Whether the dimension with rows is one of the op's M."""
    dims = tensor._dims or ()
    symbols = [parse_dim(dim).symbol for dim in arg.dims]
    rows = [at for at, dim in enumerate(dims) if dim is not None and dim.per_row]
    if not rows:  # narrowed to some of them: a chunk has others
        return False
    if len(dims) == len(symbols):
        return all(symbols[at] == "M" for at in rows)
    return rows == [0] and symbols[0] == "M"
