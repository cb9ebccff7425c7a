"""The decoder layers of a model as sequences of hdispatch's ops: a step from token ids to the normed hidden states.

A layer is norm, qkv product, attention with all that belongs to it, quantization, out product, norm, gate and up product,
activation, down product; norms, activations and quantizations are one kernel where the scheme allows. All layers are one
sequence, which one call launches. With tensor parallel, sums over ranks are steps of it where vLLM takes its custom all-reduce;
else, and for many rows, each half of a layer is a sequence, and vLLM's sums lie between them.
What lies between steps is in the sequences' arena; steps with more rows than it has run in chunks but for attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from ... import _C, ops
from ...replay import Replays
from ...sequence import Arena, Sequence, SequenceInteger, SequenceTensor
from . import settings
from .all_reduce import CustomAllReduce
from .attention import Attention, Kind
from .schemes import FP8, LOW_LATENCY_ROWS, Linear, Norm, Operand
from .weights import Weights, kept_memory
from .workspace import ROWS, Workspace, rows_within

#: Most rows of a step that is replayed when it comes again: its residual and hidden states keep memory of their own. And of one
#: whose sums over ranks are steps of the sequence.
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
    all_reduce   sums as steps of a sequence, where vLLM has them
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
        all_reduce: CustomAllReduce | None = None,
    ) -> None:
        self.model, self.weights, self.attention = model, weights, attention
        self.all_reduce = all_reduce
        self._get_context, self._reduce = get_context, reduce
        self._names = [layer.attention.layer_name for layer in weights.layers]
        #: The sequences that a kind of step calls, for few rows or for any: one of all layers ("whole"), or one of each half of
        #: a layer in turn. They take the slots residual, sum (halves), hidden, those of sums over ranks (whole) and those of
        #: attention, in which the halves of activations have no part.
        self._steps: dict[tuple[Kind, bool, bool], tuple[Callable[..., None], ...]] = {}
        device = weights.embedding.device
        wholes = {reduce is None, reduce is None or all_reduce is not None}
        sketches = [_Builder(self, Kind.NOTHING, few=False, whole=each, rows=ROWS, arena=Arena()).make() for each in wholes]
        row_bytes = max(each.arena_bytes for sketch in sketches for each in sketch) // ROWS
        kept = former.workspace if former is not None and former.workspace.fits(row_bytes, device) else None
        self.workspace: Workspace = kept or Workspace(rows_within(row_bytes, most_rows), row_bytes, device)
        #: Where replayed steps have residual and hidden states: a graph has their addresses.
        self._still: torch.Tensor | None = None
        rows = min(REPLAYED_ROWS, self.workspace.rows)  # none in chunks
        #: Most rows of a step whose sums over ranks are steps of the sequence.
        self._summed_rows = 0 if all_reduce is None else min(rows, all_reduce.memory.size(0))
        if True in wholes and device.type == "cuda" and settings.replay():
            made = torch.empty(2, rows, weights.shape.hidden, dtype=weights.dtype, device=device)
            self._still = kept_memory(made, None if former is None else former._still)

    def forward(
        self, input_ids: torch.Tensor | None, positions: torch.Tensor, inputs_embeds: torch.Tensor | None
    ) -> torch.Tensor:
        """Hidden states [rows, hidden] after the last norm; of a decode step valid until the next one, as a graph's are."""
        metadata, slots = self._step(self._get_context())
        rows, kind = positions.size(0), self.attention.kind(metadata)
        few = not self.weights.scheme.quantized and rows <= LOW_LATENCY_ROWS
        whole = self._reduce is None or self._sums_in_sequence(rows)
        sequences = self._steps.get((kind, few, whole)) or self._make_steps(kind, few, whole)
        given = self.attention.given(kind, positions, metadata, slots)
        if whole and kind is Kind.HALF and self._still is not None and rows <= self._still.size(1):
            hidden = self._still[1, :rows]
            residual = self._embed(input_ids, inputs_embeds, whole, self._still[0, :rows])
        else:
            residual = self._embed(input_ids, inputs_embeds, whole)
            hidden = torch.empty_like(residual)
        if self._reduce is not None and not whole:
            return self._run_halves(sequences, residual, hidden, given, self._reduce)
        sums = () if self._reduce is None else self._sums(rows)
        sequences[0](residual, hidden, *sums, *given)
        return hidden

    def _sums_in_sequence(self, rows: int) -> bool:
        """Whether a step's sums over ranks are steps of the sequence."""
        return 0 < rows <= self._summed_rows and self.all_reduce is not None and self.all_reduce.objection() is None

    def _sums(self, rows: int) -> tuple[Any, ...]:
        """The values of the slots of sums over ranks."""
        assert self.all_reduce is not None
        return self.all_reduce.memory[:rows], self.all_reduce.handle()

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
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        whole: bool,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The embeddings of a step, in `out` or in memory of their own: they become the residual."""
        if inputs_embeds is not None:
            made = torch.empty_like(inputs_embeds, dtype=self.weights.dtype) if out is None else out
            return made.copy_(inputs_embeds)
        if self._reduce is None:
            assert input_ids is not None
            return torch.index_select(self.weights.embedding, 0, input_ids, out=out)
        shard = _shard(self.model.embed_tokens, self.weights.dtype) if whole else None
        if shard is not None:
            assert input_ids is not None
            assert self.all_reduce is not None
            return self._embed_shard(input_ids, shard, self.all_reduce, out)
        embedded: torch.Tensor = self.model.embed_tokens(input_ids)
        return embedded if out is None else out.copy_(embedded)

    def _embed_shard(
        self, input_ids: torch.Tensor, shard: tuple[int, ...], all_reduce: CustomAllReduce, out: torch.Tensor | None
    ) -> torch.Tensor:
        """The rows of this rank's part of the vocabulary, zeros for others, summed over ranks."""
        rows = input_ids.size(0)
        made = self.weights.embedding.new_empty(rows, self.weights.shape.hidden) if out is None else out
        torch.ops._C.vocab_parallel_embedding(all_reduce.memory[:rows], input_ids, self.weights.embedding, *shard)
        all_reduce.sum(rows, made)
        return made

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

    def _make_steps(self, kind: Kind, few: bool, whole: bool) -> tuple[Callable[..., None], ...]:
        made = _Builder(self, kind, few=few, whole=whole, rows=self.workspace.rows, arena=self.workspace.arena).make()
        is_replayed = whole and kind is Kind.HALF and self._still is not None
        steps = tuple(Replays(each, around=self.all_reduce) for each in made) if is_replayed else made
        self._steps[kind, few, whole] = steps
        return steps


def _shard(embedding: Any, dtype: torch.dtype) -> tuple[int, ...] | None:
    """The part of the vocabulary that vLLM's embedding has on this rank, as `vocab_parallel_embedding` takes it; None for one
    that does more than that op and a sum.
    """
    plain = getattr(embedding, "use_fused_embedding", False) and embedding.reduce_results and embedding.parallel_group is None
    if not plain or embedding.weight.dtype != dtype:
        return None
    at = embedding.shard_indices
    ends = at.org_vocab_start_index, at.org_vocab_end_index, at.num_org_vocab_padding
    return *ends, at.added_vocab_start_index, at.added_vocab_end_index


class _Builder:
    """Makes the sequences of one kind of step.

    few    whether for at most LOW_LATENCY_ROWS rows alone
    whole  all layers, with sums over ranks if there are several; else each half of a layer
    rows   of the arena
    """

    def __init__(self, layers: FusedLayers, kind: Kind, *, few: bool, whole: bool, rows: int, arena: Arena) -> None:
        self.weights, self.attention, self.all_reduce = layers.weights, layers.attention, layers.all_reduce
        self.scheme, self.kind, self.few, self.whole = layers.weights.scheme, kind, few, whole
        self.rows, self.arena = rows, arena

    def make(self) -> tuple[_C.Sequence, ...]:
        """Described and frozen."""
        return tuple(s.freeze() for s in ((self._all(),) if self.whole else self._halves()))

    def _all(self) -> Sequence:
        """All layers and the last norm."""
        s, weights = Sequence(LAYERS, max_rows=self.rows, arena=self.arena), self.weights
        residual, result = self._slot(s, "residual"), self._slot(s, "hidden")
        total, last = None, len(weights.layers) - 1
        sums = self._declare_sums(s)
        slots = self.attention.declare(s, self.kind)
        for n in range(len(weights.layers)):
            attended = self._add_up(s, sums, None, partial(self._attend, s, n, residual, total, slots=slots))
            total = self._add_up(s, sums, result if n == last else None, partial(self._activate, s, n, residual, attended))
        assert total is not None
        s.add(ops.fused_add_rms_norm, result, residual, weights.final_norm, weights.epsilon)
        return s

    def _declare_sums(self, s: Sequence) -> tuple[CustomAllReduce, SequenceTensor, SequenceInteger] | None:
        """The slots of sums over ranks; None on one rank."""
        if self.all_reduce is None:
            return None
        return self.all_reduce, self._slot(s, "shared"), s.int_slot("all_reduce_handle")

    def _add_up(
        self,
        s: Sequence,
        sums: tuple[CustomAllReduce, SequenceTensor, SequenceInteger] | None,
        total: SequenceTensor | None,
        add_half: Callable[[SequenceTensor], None],
    ) -> SequenceTensor:
        """Half of a layer with its sum over ranks, if there are several, in `total` or a new temporary."""
        if total is None:
            total = self._temp(s, self.weights.shape.hidden)
        if sums is None:
            add_half(total)
        else:
            all_reduce, shared, handle = sums
            add_half(shared)
            all_reduce.add(s, handle, shared, total)
        return total

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
        scheme.norm(s, x, normed, Norm(weight, self.weights.epsilon, added), linear)
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
