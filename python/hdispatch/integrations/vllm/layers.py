"""The decoder layers of a model as sequences of hdispatch's ops: a step from token ids to the normed hidden states.

A layer is norm, qkv product, attention with all that belongs to it, quantization, out product, norm, gate and up product,
activation, down product; norms, activations and quantizations are one kernel where the scheme allows. All layers are one
sequence, which one call launches; with tensor parallel, each half of a layer is one, and sums over ranks lie between them.
What lies between steps is in the sequences' arena; steps with more rows than it has run in chunks but for attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from ... import _C, ops
from ...replay import Replays
from ...sequence import Arena, Sequence, SequenceTensor
from . import settings
from .attention import Attention, Kind
from .schemes import FP8, LOW_LATENCY_ROWS, Linear, Operand
from .weights import Weights, kept_memory
from .workspace import ROWS, Workspace, rows_within

#: Most rows of a step that is replayed when it comes again: its residual and hidden states keep memory of their own.
REPLAYED_ROWS = 256

#: The sequences' names in `stats`.
LAYERS, HALF_LAYER = "decoder layers", "half a decoder layer"


class FusedLayers:
    """A model's decoder layers on one device. Steps run one after the other, in whatever streams.

    model        vLLM's decoder: embed_tokens, layers, norm
    weights      what `weights.bind` made of it
    most_rows    of a step
    attention    of all layers
    get_context  vLLM's forward context of the step
    reduce       sums a tensor over tensor parallel ranks into a new one; None on one rank
    former       layers whose weights are no more: their memory is used again, since graphs may have been captured with it
    """

    def __init__(
        self,
        model: Any,
        weights: Weights,
        most_rows: int,
        attention: Attention,
        get_context: Callable[[], Any],
        reduce: Callable[[torch.Tensor], torch.Tensor] | None,
        former: FusedLayers | None = None,
    ) -> None:
        self.model, self.weights, self.attention = model, weights, attention
        self._get_context, self._reduce = get_context, reduce
        self._names = [layer.attention.layer_name for layer in weights.layers]
        #: What a kind of step calls, for few rows or for any: one sequence of all layers, or with sums over ranks, one of
        #: each half of a layer in turn. They take the slots residual, sum (halves), hidden and those of attention, in which the
        #: halves of activations have no part.
        self._steps: dict[tuple[Kind, bool], tuple[Callable[..., None], ...]] = {}
        device = weights.embedding.device
        sketch = _Builder(self, Kind.NOTHING, few=False, rows=ROWS, arena=Arena()).make()
        row_bytes = max(each.arena_bytes for each in sketch) // ROWS
        kept = former.workspace if former is not None and former.workspace.fits(row_bytes, device) else None
        self.workspace: Workspace = kept or Workspace(rows_within(row_bytes, most_rows), row_bytes, device)
        #: Where replayed steps have residual and hidden states: a graph has their addresses.
        self._still: torch.Tensor | None = None
        if reduce is None and device.type == "cuda" and settings.replay():
            rows = min(REPLAYED_ROWS, self.workspace.rows)  # none in chunks
            made = torch.empty(2, rows, weights.shape.hidden, dtype=weights.dtype, device=device)
            self._still = kept_memory(made, None if former is None else former._still)

    def forward(
        self, input_ids: torch.Tensor | None, positions: torch.Tensor, inputs_embeds: torch.Tensor | None
    ) -> torch.Tensor:
        """Hidden states [rows, hidden] after the last norm; of a decode step valid until the next one, as a graph's are."""
        metadata, slots = self._step(self._get_context())
        kind = self.attention.kind(metadata)
        few = not self.weights.scheme.quantized and positions.size(0) <= LOW_LATENCY_ROWS
        sequences = self._steps.get((kind, few)) or self._make_steps(kind, few)
        given = self.attention.given(kind, positions, metadata, slots)
        if kind is Kind.HALF and self._still is not None and positions.size(0) <= self._still.size(1):
            hidden = self._still[1, : positions.size(0)]
            residual = self._embed(input_ids, inputs_embeds, self._still[0, : positions.size(0)])
        else:
            residual = self._embed(input_ids, inputs_embeds)
            hidden = torch.empty_like(residual)
        if self._reduce is None:
            sequences[0](residual, hidden, *given)
            return hidden
        return self._run_halves(sequences, residual, hidden, given, self._reduce)

    def _step(self, context: Any) -> tuple[Any, Any]:
        """Attention's metadata and cache slots of the step, one for all layers; None in a run without caches."""
        found = context.attn_metadata
        if not found:
            return None, None
        if type(found) is list:  # of a draft model's steps, and ours is the first
            found = found[0]
        metadata = found[self._names[0]]
        if found[self._names[-1]] is not metadata:
            raise RuntimeError("hdispatch: layers of one model have different attention metadata; report this configuration")
        if not self.attention.is_bound():
            self.attention.bind()
            self._steps.clear()  # the caches are constants of the sequences
        return metadata, context.slot_mapping[self._names[0]]

    def _embed(
        self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The embeddings of a step, in `out` or in memory of their own: they become the residual."""
        if inputs_embeds is not None:
            made = torch.empty_like(inputs_embeds, dtype=self.weights.dtype) if out is None else out
            return made.copy_(inputs_embeds)
        if self._reduce is None:
            assert input_ids is not None
            return torch.index_select(self.weights.embedding, 0, input_ids, out=out)
        embedded: torch.Tensor = self.model.embed_tokens(input_ids)
        return embedded

    def _run_halves(
        self,
        sequences: tuple[Callable[..., None], ...],
        residual: torch.Tensor,
        hidden: torch.Tensor,
        given: tuple[Any, ...],
        reduce: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """With a sum over ranks after each half of a layer: a new tensor, which the steps after it read where it is."""
        total = residual  # of which the first half takes no notice
        for n, half in enumerate(sequences):
            half(residual, total, hidden, *(given if n % 2 == 0 else ()))
            total = reduce(hidden)
        ops.fused_add_rms_norm(total, residual, self.weights.final_norm, self.weights.epsilon)
        return total

    def _make_steps(self, kind: Kind, few: bool) -> tuple[Callable[..., None], ...]:
        made = _Builder(self, kind, few=few, rows=self.workspace.rows, arena=self.workspace.arena).make()
        is_replayed = kind is Kind.HALF and self._still is not None
        steps = tuple(map(Replays, made)) if is_replayed else made
        self._steps[kind, few] = steps
        return steps

    @property
    def is_parallel(self) -> bool:
        """Whether sums over ranks are taken."""
        return self._reduce is not None


class _Builder:
    """Makes the sequences of one kind of step.

    few   whether for at most LOW_LATENCY_ROWS rows alone
    rows  of the arena
    """

    def __init__(self, layers: FusedLayers, kind: Kind, *, few: bool, rows: int, arena: Arena) -> None:
        self.weights, self.attention, self.is_parallel = layers.weights, layers.attention, layers.is_parallel
        self.scheme, self.kind, self.few = layers.weights.scheme, kind, few
        self.rows, self.arena = rows, arena

    def make(self) -> tuple[_C.Sequence, ...]:
        """Described and frozen."""
        return tuple(s.freeze() for s in (self._halves() if self.is_parallel else (self._all(),)))

    def _all(self) -> Sequence:
        """All layers and the last norm."""
        s, weights = Sequence(LAYERS, max_rows=self.rows, arena=self.arena), self.weights
        residual, result = self._slot(s, "residual"), self._slot(s, "hidden")
        slots = self.attention.declare(s, self.kind)
        total = None
        for n in range(len(weights.layers)):
            out = self._temp(s, weights.shape.hidden)
            self._attend(s, n, residual, total, out, slots)
            total = result if n + 1 == len(weights.layers) else self._temp(s, weights.shape.hidden)
            self._activate(s, n, residual, out, total)
        s.add(ops.fused_add_rms_norm, result, residual, weights.final_norm, weights.epsilon)
        return s

    def _halves(self) -> Iterator[Sequence]:
        """Each half of each layer, up to what is summed."""
        for n in range(len(self.weights.layers)):
            s, *places = self._half()
            self._attend(s, n, places[0], None if n == 0 else places[1], places[2], self.attention.declare(s, self.kind))
            yield s
            s, *places = self._half()
            self._activate(s, n, *places)
            yield s

    def _half(self) -> tuple[Sequence, SequenceTensor, SequenceTensor, SequenceTensor]:
        """A sequence with the slots residual, sum and hidden."""
        s = Sequence(HALF_LAYER, max_rows=self.rows, arena=self.arena)
        residual, total = self._slot(s, "residual"), self._slot(s, "sum", written=self.scheme.norms_in_place)
        return s, residual, total, self._slot(s, "hidden")

    # ---- the halves of a layer ----

    def _attend(
        self,
        s: Sequence,
        n: int,
        residual: SequenceTensor,
        total: SequenceTensor | None,
        hidden: SequenceTensor,
        slots: dict[str, Any],
    ) -> None:
        """From the norm of residual + total, or of the residual alone, to the out product in `hidden`."""
        layer, shape, scheme = self.weights.layers[n], self.weights.shape, self.scheme
        normed = self._norm(s, residual, total, layer.input_norm, layer.qkv)
        qkv, attended = self._temp(s, shape.qkv), self._temp(s, shape.attended)
        scheme.product(s, qkv, normed, layer.qkv, self.few)
        self.attention.add(s, self.kind, slots, n, qkv, attended)
        operand = self._operand(s, shape.attended, None) if scheme.quantized else Operand(attended)
        scheme.quantize(s, attended, operand, layer.out)
        scheme.product(s, hidden, operand, layer.out, self.few)

    def _activate(self, s: Sequence, n: int, residual: SequenceTensor, total: SequenceTensor, hidden: SequenceTensor) -> None:
        """From the norm of residual + total to the down product in `hidden`."""
        layer, shape, scheme = self.weights.layers[n], self.weights.shape, self.scheme
        normed = self._norm(s, residual, total, layer.output_norm, layer.gate_up)
        gate_up = self._temp(s, 2 * shape.intermediate)
        scheme.product(s, gate_up, normed, layer.gate_up, self.few)
        plain = self._temp(s, shape.intermediate) if scheme.norms_in_place else None
        activated = self._operand(s, shape.intermediate, plain)
        scheme.activate(s, gate_up, activated, layer.down)
        scheme.product(s, hidden, activated, layer.down, self.few)

    def _norm(
        self, s: Sequence, residual: SequenceTensor, total: SequenceTensor | None, weight: torch.Tensor, linear: Linear
    ) -> Operand:
        """The first layer's input is the embedding, which is the residual itself."""
        scheme, width, plain = self.scheme, self.weights.shape.hidden, total
        if scheme.norms_in_place and total is None:
            plain = self._temp(s, width)
        normed = self._operand(s, width, plain)
        x, added = (residual, None) if total is None else (total, residual)
        scheme.norm(s, x, normed, weight, self.weights.epsilon, added, linear)
        return normed

    # ---- slots and temporaries ----

    def _slot(self, s: Sequence, name: str, *, written: bool = True) -> SequenceTensor:
        return s.slot(name, ("M", self.weights.shape.hidden), self.weights.dtype, written=written)

    def _temp(self, s: Sequence, width: int) -> SequenceTensor:
        return s.temp(("M", width), self.weights.dtype)

    def _operand(self, s: Sequence, width: int, plain: SequenceTensor | None) -> Operand:
        """An input of a product: `plain` itself in 16 bits, else new values and scales beside it."""
        if not self.scheme.quantized:
            assert plain is not None
            return Operand(plain)
        count = self.scheme.scale_width(width)
        scales = s.temp((count, "M"), torch.float32).transpose(0, 1) if count > 1 else None
        if count == 1:
            scales = s.temp(("M", 1), torch.float32)
        return Operand(s.temp(("M", width), FP8), scales, plain)
