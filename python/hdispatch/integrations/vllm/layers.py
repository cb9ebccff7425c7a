"""The decoder layers of a model, run by hdispatch's ops: a step from token ids to the normed hidden states.

A layer is norm, qkv product, attention with all that belongs to it, quantization, out product, norm, gate and up product,
activation, down product; norms, activations and quantizations are one kernel where the scheme allows. It runs as a list of
calls: ops and their arguments. All buffers are views of one arena, and the arguments of all layers are made once for each
number of rows, but for what attention knows only in the step. Steps with more rows than the arena has run what lies between
two attentions in chunks.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ... import ops
from .attention import Attention, Heads
from .schemes import FP8, Call, Operand
from .weights import Layer, Weights
from .workspace import Arena, Buffer, rows_within

#: Most numbers of rows whose argument tuples are kept: those of 36 layers take 60 KB.
PLANS = 256

# The steps of a layer, for the lifetimes of buffers.
NORM, QKV, ROPE, ATTEND, QUANTIZE, OUT, NORM_2, GATE_UP, ACTIVATE, DOWN = range(10)


def layer_buffers(weights: Weights) -> list[Buffer]:
    """The buffers of a layer's steps."""
    shape, scheme, dtype = weights.shape, weights.scheme, weights.dtype
    found = []

    def add(name: str, width: int, dtype: torch.dtype, *steps: int, columns: bool = False) -> None:
        found.append(Buffer(name, width, dtype, frozenset(steps), columns))

    def add_operand(name: str, width: int, *steps: int) -> None:
        """An fp8 input of a product, and its scales."""
        add(name, width, FP8, *steps)
        if scheme.scale_width(width):
            add(f"{name}.scales", scheme.scale_width(width), torch.float32, *steps, columns=scheme.scale_width(width) > 1)

    in_place = (QKV, GATE_UP) if not scheme.quantized else ()
    add("residual", shape.hidden, dtype, *range(10))
    add("hidden", shape.hidden, dtype, DOWN, NORM, OUT, NORM_2, *in_place)
    add("qkv", shape.qkv, dtype, QKV, ROPE, ATTEND)
    add("attended", shape.attended, dtype, ATTEND, QUANTIZE, *(() if scheme.quantized else (OUT,)))
    add("gate_up", 2 * shape.intermediate, dtype, GATE_UP, ACTIVATE)
    if scheme.quantized:
        add_operand("normed", shape.hidden, NORM, QKV, NORM_2, GATE_UP)
        add_operand("attended.fp8", shape.attended, QUANTIZE, OUT)
        add_operand("activated.fp8", shape.intermediate, ACTIVATE, DOWN)
    if scheme.norms_in_place:
        add("activated", shape.intermediate, dtype, ACTIVATE, *(() if scheme.quantized else (DOWN,)))
    return found


def chunk_rows(m: int, most: int) -> int:
    """Rows of each chunk of m, at most `most`, the last one shorter. Chunks start where tensors are aligned as at row 0."""
    count = -(-m // most)
    return min(most, -(-m // (16 * count)) * 16)


@dataclass(frozen=True)
class Rows:
    """The tensors of some rows of a step. `hidden` is what products add to the residual; the rest is named as buffers are."""

    residual: torch.Tensor
    hidden: torch.Tensor
    qkv: torch.Tensor
    attended: torch.Tensor
    gate_up: torch.Tensor
    normed: Operand
    attended_in: Operand
    activated: Operand


#: An op, and its arguments before and after the one that is known only in the step; None after: all are known.
Fed = tuple[Callable[..., Any], tuple[Any, ...], tuple[Any, ...] | None]


@dataclass(frozen=True)
class Plan:
    """All that a step of m rows calls, apart from what is known only then.

    heads   the rows as attention takes them
    fronts  of each layer, the calls before attention: norm and qkv product
    outs    of each layer, from attention to the out product
    backs   of each layer, from the second norm to the down product; with a sum over ranks, to the activation
    downs   of each layer, the down product, where sums over ranks are taken
    summed  of each layer, `backs` and the `fronts` of the next one with a place for the sum that they read
    """

    rows: Rows
    heads: Heads
    fronts: tuple[tuple[Call, ...], ...]
    outs: tuple[tuple[Call, ...], ...]
    backs: tuple[tuple[Call, ...], ...]
    downs: tuple[tuple[Call, ...], ...]
    summed: tuple[tuple[tuple[Fed, ...], tuple[Fed, ...]], ...]
    final: tuple[Any, ...]


class FusedLayers:
    """A model's decoder layers on one device and stream.

    model        vLLM's decoder: embed_tokens, layers, norm
    weights      what `weights.bind` made of it
    most_rows    of a step
    attention    of all layers
    get_context  vLLM's forward context of the step
    reduce       sums a tensor over tensor parallel ranks into a new one; None on one rank
    former       layers whose weights are no more: their arena is used again, since graphs may have been captured with it
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
        buffers = layer_buffers(weights)
        device = weights.embedding.device
        kept = former.arena if former is not None and former.arena.fits(buffers, device) else None
        self.arena: Arena = kept or Arena(buffers, rows_within(buffers, most_rows), device)
        self._plans: OrderedDict[int, Plan] = OrderedDict()
        self._names = [layer.attention.layer_name for layer in weights.layers]

    # ---- a step ----

    def forward(
        self, input_ids: torch.Tensor | None, positions: torch.Tensor, inputs_embeds: torch.Tensor | None
    ) -> torch.Tensor:
        """Hidden states [rows, hidden] after the last norm; valid until the next step on the stream."""
        m = positions.size(0)
        context = self._get_context()
        metadata, slots = self._step(context)
        if m > self.arena.rows:
            return self._run_in_chunks(m, input_ids, positions, inputs_embeds, metadata, slots)
        plan = self._plans.get(m)
        if plan is None:
            plan = self._make_plan(m)
        else:
            self._plans.move_to_end(m)
        self._embed(plan.rows.residual, input_ids, inputs_embeds)
        return self._run(plan, positions, metadata, slots)

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
        return metadata, context.slot_mapping[self._names[0]]

    def _embed(self, out: torch.Tensor, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> None:
        if inputs_embeds is not None:
            out.copy_(inputs_embeds)
        elif self._reduce is None:
            assert input_ids is not None
            torch.index_select(self.weights.embedding, 0, input_ids, out=out)
        else:
            out.copy_(self.model.embed_tokens(input_ids))

    def _run(self, plan: Plan, positions: torch.Tensor, metadata: Any, slots: Any) -> torch.Tensor:
        if metadata is None:
            plan.rows.attended.zero_()  # vLLM's memory profile, before the caches exist: all but attention runs
        middles = self.attention.calls(plan.heads, positions, metadata, slots)
        if self._reduce is not None:
            return self._run_parallel(plan, middles, self._reduce)
        for layer in zip(plan.fronts, middles, plan.outs, plan.backs, strict=True):
            for calls in layer:
                for op, arguments in calls:
                    op(*arguments)
        ops.fused_add_rms_norm(*plan.final)
        return plan.rows.hidden

    def _run_parallel(
        self, plan: Plan, middles: list[tuple[Call, ...]], reduce: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """With a sum over ranks after each half of a layer: a new tensor, which the calls after it read where it is."""
        hidden = total = plan.rows.hidden
        _call(plan.fronts[0])
        for middle, out, down, (back, front) in zip(middles, plan.outs, plan.downs, plan.summed, strict=True):
            _call(middle)
            _call(out)
            _feed(back, reduce(hidden))
            _call(down)
            total = reduce(hidden)
            _feed(front, total)
        ops.fused_add_rms_norm(total, *plan.final[1:])
        return total

    # ---- more rows than the arena has ----

    def _run_in_chunks(
        self,
        m: int,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        inputs_embeds: torch.Tensor | None,
        metadata: Any,
        slots: Any,
    ) -> torch.Tensor:
        """A step whose residual, qkv and attention output are allocated, and whose other buffers hold a chunk at a time."""
        shape, dtype, device = self.weights.shape, self.weights.dtype, self.arena.memory.device
        residual, result = (torch.empty(m, shape.hidden, dtype=dtype, device=device) for _ in range(2))
        qkv = torch.empty(m, shape.qkv, dtype=dtype, device=device)
        attended = torch.empty(m, shape.attended, dtype=dtype, device=device)
        self._embed(residual, input_ids, inputs_embeds)
        if metadata is None:
            attended.zero_()
        middles = self.attention.calls(self.attention.plan(qkv, attended), positions, metadata, slots)
        chunks = list(self._chunks(m, residual, qkv, attended))
        layers = self.weights.layers
        for rows, _ in chunks:
            _call(self._front(rows, layers[0], first=True))
        for n, (layer, middle) in enumerate(zip(layers, middles, strict=True)):
            _call(middle)
            for rows, at in chunks:
                _call(self._out(rows, layer))
                self._sum(rows.hidden)
                _call((*self._back(rows, layer), *self._down(rows, layer)))
                self._sum(rows.hidden)
                if n + 1 < len(layers):
                    _call(self._front(rows, layers[n + 1], first=False))
                else:
                    ops.fused_add_rms_norm(rows.hidden, rows.residual, self.weights.final_norm, self.weights.epsilon)
                    result[at].copy_(rows.hidden)
        return result

    def _chunks(
        self, m: int, residual: torch.Tensor, qkv: torch.Tensor, attended: torch.Tensor
    ) -> Iterator[tuple[Rows, slice]]:
        """Tensors and place of each chunk of rows; chunks are about equally long."""
        size = chunk_rows(m, self.arena.rows)
        for begin in range(0, m, size):
            at = slice(begin, min(m, begin + size))
            yield self._rows(at.stop - begin, residual[at], qkv[at], attended[at]), at

    def _sum(self, hidden: torch.Tensor) -> None:
        if self._reduce is not None:
            hidden.copy_(self._reduce(hidden))

    # ---- plans ----

    def _make_plan(self, m: int) -> Plan:
        view = self.arena.view
        rows = self._rows(m, view("residual", m), view("qkv", m), view("attended", m))
        layers = self.weights.layers
        fronts = tuple(self._front(rows, layer, first=layer is layers[0]) for layer in layers)
        backs = tuple(self._back(rows, layer) for layer in layers)
        downs = tuple(self._down(rows, layer) for layer in layers)
        parallel = self._reduce is not None
        plan = Plan(
            rows,
            self.attention.plan(rows.qkv, rows.attended),
            fronts,
            tuple(self._out(rows, layer) for layer in layers),
            backs if parallel else tuple(a + b for a, b in zip(backs, downs, strict=True)),
            downs,
            _with_places(backs, fronts, rows.hidden) if parallel else (),
            (rows.hidden, rows.residual, self.weights.final_norm, self.weights.epsilon),
        )
        self._plans[m] = plan
        if len(self._plans) > PLANS:
            self._plans.popitem(last=False)
        return plan

    def _rows(self, m: int, residual: torch.Tensor, qkv: torch.Tensor, attended: torch.Tensor) -> Rows:
        """Views of the arena for m rows, beside what is given."""
        view = self.arena.view
        hidden = view("hidden", m)
        if not self.weights.scheme.quantized:
            operands = (Operand(hidden), Operand(attended), Operand(view("activated", m)))
        else:
            in_place = self.weights.scheme.norms_in_place
            operands = (
                self._operand("normed", m, hidden),
                self._operand("attended.fp8", m, None),
                self._operand("activated.fp8", m, view("activated", m) if in_place else None),
            )
        return Rows(residual, hidden, qkv, attended, view("gate_up", m), *operands)

    def _operand(self, name: str, m: int, plain: torch.Tensor | None) -> Operand:
        scales = f"{name}.scales"
        return Operand(self.arena.view(name, m), self.arena.view(scales, m) if scales in self.arena.buffers else None, plain)

    # ---- the calls of a layer ----

    def _front(self, rows: Rows, layer: Layer, *, first: bool) -> tuple[Call, ...]:
        """Norm and qkv product. The first layer's input is the embedding, which is the residual itself."""
        scheme, epsilon = self.weights.scheme, self.weights.epsilon
        x, residual = (rows.residual, None) if first else (rows.hidden, rows.residual)
        norm = scheme.norm(x, rows.normed, layer.input_norm, epsilon, residual, layer.qkv)
        return (*norm, *scheme.product(rows.qkv, rows.normed, layer.qkv))

    def _out(self, rows: Rows, layer: Layer) -> tuple[Call, ...]:
        scheme = self.weights.scheme
        quantize = scheme.quantize(rows.attended, rows.attended_in, layer.out)
        return (*quantize, *scheme.product(rows.hidden, rows.attended_in, layer.out))

    def _back(self, rows: Rows, layer: Layer) -> tuple[Call, ...]:
        scheme = self.weights.scheme
        return (
            *scheme.norm(rows.hidden, rows.normed, layer.output_norm, self.weights.epsilon, rows.residual, layer.gate_up),
            *scheme.product(rows.gate_up, rows.normed, layer.gate_up),
            *scheme.activate(rows.gate_up, rows.activated, layer.down),
        )

    def _down(self, rows: Rows, layer: Layer) -> tuple[Call, ...]:
        return tuple(self.weights.scheme.product(rows.hidden, rows.activated, layer.down))


def _call(calls: tuple[Call, ...]) -> None:
    for op, arguments in calls:
        op(*arguments)


def _with_places(
    backs: tuple[tuple[Call, ...], ...], fronts: tuple[tuple[Call, ...], ...], hidden: torch.Tensor
) -> tuple[tuple[tuple[Fed, ...], tuple[Fed, ...]], ...]:
    """Of each layer, its back and the next one's front, both with a place where they read or change `hidden`."""
    following = (*fronts[1:], ())
    return tuple(
        (tuple(_with_place(call, hidden) for call in back), tuple(_with_place(call, hidden) for call in front))
        for back, front in zip(backs, following, strict=True)
    )


def _with_place(call: Call, hidden: torch.Tensor) -> Fed:
    op, arguments = call
    places = [at for at, each in enumerate(arguments) if each is hidden]
    if not places:
        return op, arguments, None
    (at,) = places
    return op, arguments[:at], arguments[at + 1 :]


def _feed(calls: tuple[Fed, ...], x: torch.Tensor) -> None:
    """Make the calls, with x where they have a place."""
    for op, before, after in calls:
        if after is None:
            op(*before)
        else:
            op(*before, x, *after)
