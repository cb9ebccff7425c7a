"""The arguments that the candidates of a cell are called with: one set to check them by, and copies to rotate through."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from .. import _C, registry
from ..ladders import bucket_bounds
from ..opspec import CALL_SYMBOLS, OpSpec, TensorArg
from ..testing.device_timer import rotation_count
from ..testing.numeric import compare_outputs
from .candidates import Cell
from .device import Call, Device

#: Tensors with more elements than this are checked with fewer rows, if the bucket has fewer: the reference is slow.
CHECKED_ELEMENTS = 2**26


class CellArguments:
    """The arguments of one cell, of each mix of its op; made from the seed, so that every candidate gets the same values."""

    def __init__(self, cell: Cell, device: Device, seed: int) -> None:
        self.op = registry.get(cell["op"])
        self.device = device
        spec = self.spec = registry.spec(cell["op"])
        self.variant = spec.variant(cell["variant"])
        measured = spec.measured(self.variant) if spec.measured else {}
        every = {symbol: measured.get(symbol, spec.hint(symbol)) for symbol in CALL_SYMBOLS}
        every |= {"K": cell["K"], "N": cell["N"]}
        sizes = {symbol: every[symbol] for symbol in spec.symbols() if symbol != "M"}
        if spec.second is not None:
            sizes[spec.second.name] = cell["second"]
        generator = torch.Generator(device.torch_device).manual_seed(seed)

        def sample(m: int, mix: Mapping[str, int]) -> list[Any]:
            return spec.sample(self.variant, {**sizes, "M": m, **mix}, device.torch_device, generator)

        first, *others = spec.mixes
        arguments = sample(cell["M"], first)
        bucket_of_m, _ = spec.ladders.split(cell["bucket"])
        elements = max((t.numel() for t in _tensors(arguments)), default=0)
        checked_m = checked_rows(spec.ladder, bucket_of_m, cell["M"], elements)
        self.checked = arguments if checked_m == cell["M"] else sample(checked_m, first)
        self.want = copied(self.checked)
        spec.reference(*self.want)
        self.right: list[Any] | None = None
        self.bytes = sum(t.numel() * t.element_size() for t in _tensors(arguments))
        self.weight_bytes = sum(t.numel() * t.element_size() for t in _tensors(weights(spec, arguments)))
        kinds = [arguments, *(sample(cell["M"], mix) for mix in others)]
        #: Of each kind as many; what rotates is one of every kind at least.
        self.kinds = len(kinds)
        turns = -(-rotation_count(self.bytes) // self.kinds)
        self.sets = [copied(kind) for _ in range(turns) for kind in kinds]

    def check(self) -> None:
        """Call the published candidate once. `MismatchError` if it is not right, `MissError` if it is not launched."""
        got = copied(self.checked)
        self.device.launch(self.op, got)
        if self.right is None or not _equal(self.spec, got, self.right):
            compare_outputs(self.spec, self.variant, got, self.want)
            self.right = got

    def even(self, launches: int) -> int:
        """So many launches or some more, in which every set is used, and of each kind as many, for every candidate."""
        enough = max(launches, len(self.sets))
        return enough + -enough % self.kinds

    def calls(self) -> list[Call]:
        """Calls of the op that cycle through the sets."""
        return [_bind(self.op, arguments) for arguments in self.sets]


def _bind(op: _C.Op, arguments: Sequence[Any]) -> Call:
    return lambda: op(*arguments)


def weights(spec: OpSpec, arguments: Sequence[Any]) -> list[Any]:
    """The tensors that have the same size for every M."""
    return [
        value
        for arg, value in zip(spec.args, arguments, strict=True)
        if isinstance(arg, TensorArg) and "M" not in arg.symbols()
    ]


def _tensors(arguments: Sequence[Any]) -> Iterator[torch.Tensor]:
    return (value for value in arguments if isinstance(value, torch.Tensor))


def copied(arguments: Sequence[Any]) -> list[Any]:
    """The same values in other memory; of tensors without gaps also the same strides."""
    return [value.clone() if isinstance(value, torch.Tensor) else value for value in arguments]


def _equal(spec: OpSpec, got: Sequence[Any], right: Sequence[Any]) -> bool:
    """Whether all outputs have the same bits: equal ones need no second comparison with the reference."""
    written = [
        (a, b) for arg, a, b in zip(spec.args, got, right, strict=True) if getattr(arg, "mutated", False) and a is not None
    ]
    return all(torch.equal(_bits(a), _bits(b)) for a, b in written)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.view(kinds[tensor.element_size()])


def checked_rows(ladder: Sequence[int], bucket: int, m: int, elements: int) -> int:
    """The M to check with: the one to time; of a call with a tensor of very many elements the bucket's first of its class."""
    first, _ = bucket_bounds(ladder, bucket)
    if elements <= CHECKED_ELEMENTS or m % 16:
        return m
    return min(m, (first + 15) // 16 * 16)
