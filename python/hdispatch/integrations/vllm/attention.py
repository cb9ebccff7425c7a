"""Attention of a step, with all that lies between the qkv product and its output: as calls of each layer.

Steps of one new token per request, pure decode, are one call of attention_half per layer. Others are fused_qk_norm_rope_cache
and FlashAttention 3, which is called without vLLM's Python around it; where the bundle has no rows of the former, rotary
embedding and vLLM's cache write.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from ... import ops
from . import settings
from .schemes import Call
from .support import loaded_ladders, objection
from .weights import Weights, plain

#: Longest model whose CUDA graphs take attention_half. vLLM captures one graph for all lengths, as if every request had
#: max_model_len tokens. FlashAttention 3 then splits requests by their lengths on the device; attention_half has as many blocks
#: as the longest length asks for, and the graph has no host time that it could save.
GRAPH_TOKENS = 8192


#: Most rows that the launch table is asked about, when vLLM has given nearly all memory to the caches: 20 MB of an 8B model.
ASKED_ROWS = 1024


@dataclass(frozen=True)
class Heads:
    """Some rows of a step as attention takes them, and of each layer the arguments that are known before the step.

    qkv     [tokens, heads + 2 * kv heads of head size elements], with q, k, v [tokens, heads or kv heads, head size] of it
    out     [tokens, heads, head size]
    ropes   arguments of the rotary embedding, without the positions
    writes  of fused_qk_norm_rope_cache, those before the positions
    halves  of attention_half, those before the positions
    """

    qkv: torch.Tensor
    out: torch.Tensor
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    ropes: tuple[tuple[Any, ...], ...]
    writes: tuple[tuple[Any, ...], ...]
    halves: tuple[tuple[Any, ...], ...]


class Attention:
    """Attention of a model's layers on one device and stream.

    weights        of the layers
    longest        tells the tokens of the longest request, vLLM's max_model_len, which vLLM may set when it knows its memory
    most           requests of a step, vLLM's max_num_seqs, and tokens, its max_num_batched_tokens
    canonical      gives dimensions of size 1 the stride that a contiguous tensor has
    decode_reason  why decode steps take FlashAttention 3 too; None if they take attention_half. Decided by `bind`.
    write_reason   why FlashAttention 3 comes after vLLM's cache write; None if after fused_qk_norm_rope_cache. Likewise.

    Call `is_bound` before each step that has caches, and `bind` where it says no: vLLM replaces the caches after profiling and
    on waking up.
    """

    def __init__(
        self,
        weights: Weights,
        longest: Callable[[], int],
        most: tuple[int, int],
        canonical: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        self._weights, self._tell_longest, self._canonical = weights, longest, canonical
        self._most, self._most_tokens = most
        self._longest = 0
        self._layers = [layer.attention for layer in weights.layers]
        self._scale = self._layers[0].impl.scale
        self._group = weights.shape.heads // weights.shape.kv_heads
        self._first = self._last = None
        self._caches: list[torch.Tensor] = []
        self._views: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self._normed = weights.layers[0].q_norm is not None
        self._setting = settings.attention()
        self._said = ""
        self.decode_reason: str | None = "no step has had caches yet"
        self.write_reason: str | None = self.decode_reason

    # ---- caches ----

    def is_bound(self) -> bool:
        """Whether the caches are those that `bind` saw."""
        return self._layers[0].kv_cache is self._first and self._layers[-1].kv_cache is self._last

    def bind(self) -> None:
        """Take every layer's cache, and K and V views of it as FlashAttentionImpl.forward makes them on each call."""
        self._caches, self._views = [], []
        for attention in self._layers:
            k, v = attention.kv_cache.transpose(1, 2).split(attention.head_size, dim=-1)
            scales = plain(attention._k_scale), plain(attention._v_scale)
            self._views.append((self._canonical(k), self._canonical(v), *scales))
            self._caches.append(self._canonical(plain(attention.kv_cache)))
        self._first, self._last = self._layers[0].kv_cache, self._layers[-1].kv_cache
        self._longest = self._tell_longest()
        if self._setting == "fa3":
            self.decode_reason = f"{settings.ATTENTION} is fa3"
        else:
            self.decode_reason = self._objection(ops.attention_half, self._half_example, self._most)
        self.write_reason = self._objection(ops.fused_qk_norm_rope_cache, self._write_example, self._most_tokens)
        self._say()

    def _say(self) -> None:
        """One line in the log on what steps take, unless it is what it was."""
        decode = "attention_half" if self.decode_reason is None else f"FlashAttention 3: {self.decode_reason}"
        write = "fused_qk_norm_rope_cache" if self.write_reason is None else f"vLLM's cache write: {self.write_reason}"
        said = f"decode steps take {decode}; others FlashAttention 3 after {write}"
        if said != self._said:
            self._said = said
            settings.logger.info("hdispatch: %s", said)

    def _objection(self, op: Any, example: Callable[[int, int], tuple[Any, ...]], most: int) -> str | None:
        """Why the launch table does not serve the op in some bucket up to `most` rows; None if it does in all of them.

        example  gives arguments for a number of rows and a length of the longest request
        """
        device = self._caches[0].device
        ladders = loaded_ladders(op.name, device)
        if not ladders.m and device.type != "cuda":  # the reference serves
            return None
        lengths = sorted({min(edge, self._longest) for edge in (*ladders.second, self._longest)})
        for rows in sorted({min(edge, most, ASKED_ROWS) for edge in (*ladders.m, most)}):
            for length in lengths:
                reason = objection(op, *example(rows, length))
                if reason is not None:
                    return reason
        return None

    def _half_example(self, requests: int, length: int) -> tuple[Any, ...]:
        """Arguments of attention_half as in a decode step of the first layer, to ask about, not to run."""
        heads, long = self._example(requests)
        short = torch.empty(requests, dtype=torch.int32, device=long.device)
        return (*heads.halves[0], long, long, self._caches[0], short.view(requests, 1), short, *self._rest_of_half(length))

    def _write_example(self, tokens: int, _: int) -> tuple[Any, ...]:
        """Arguments of fused_qk_norm_rope_cache, likewise."""
        heads, long = self._example(tokens)
        return (*heads.writes[0], long, long, self._caches[0])

    def _example(self, rows: int) -> tuple[Heads, torch.Tensor]:
        """Heads, and what has the form of positions and slots."""
        shape, dtype, device = self._weights.shape, self._weights.dtype, self._caches[0].device
        qkv = torch.empty(rows, shape.qkv, dtype=dtype, device=device)
        attended = torch.empty(rows, shape.attended, dtype=dtype, device=device)
        return self.plan(qkv, attended), torch.empty(rows, dtype=torch.int64, device=device)

    # ---- a step ----

    def plan(self, qkv: torch.Tensor, attended: torch.Tensor) -> Heads:
        """Views of qkv [tokens, …] and of the output [tokens, heads * head size], and every layer's arguments."""
        weights, shape, tokens = self._weights, self._weights.shape, qkv.size(0)
        heads = qkv.view(tokens, shape.heads + 2 * shape.kv_heads, shape.head_size)
        q, k, v = torch.split(heads, [shape.heads, shape.kv_heads, shape.kv_heads], dim=1)
        out = attended.view(tokens, shape.heads, shape.head_size)
        halves = tuple((out, qkv, layer.q_norm, layer.k_norm, weights.rope_cache) for layer in weights.layers)
        sizes = (shape.heads, shape.kv_heads, shape.head_size, weights.epsilon)
        writes = tuple((qkv, *sizes, *half[2:], weights.neox) for half in halves)
        ropes: tuple[tuple[Any, ...], ...]
        if self._normed:
            ropes = tuple((qkv, shape.heads, shape.kv_heads, *write[2:]) for write in writes)
        else:
            flat_q, flat_k = qkv[:, : shape.attended], qkv[:, shape.attended : -shape.kv_heads * shape.head_size]
            ropes = ((flat_q, flat_k, shape.head_size, weights.rope_cache, weights.neox),) * len(halves)
        return Heads(qkv, out, q, k, v, ropes, writes, halves)

    def calls(self, heads: Heads, positions: torch.Tensor, metadata: Any, slots: Any) -> list[tuple[Call, ...]]:
        """Of each layer, what is called between its qkv product and its out product.

        heads      of the step's tokens
        positions  int64 [tokens]
        metadata   vLLM's FlashAttentionMetadata; None in a run without caches, which has nothing to attend to
        slots      int64 [tokens]: where the cache gets each token's K and V; negative: nowhere

        Tokens behind metadata.num_actual_tokens are padding: what is left in their rows of the output does not matter.
        """
        if metadata is None:
            return [(rope,) for rope in self._ropes(heads, positions)]
        is_decode = self._is_decode(metadata)
        tokens = min(positions.size(0), metadata.seq_lens.size(0) if is_decode else slots.size(0))
        if tokens < positions.size(0):  # padding that vLLM has no requests or slots for
            heads, positions = self.plan(heads.qkv[:tokens], heads.out[:tokens].flatten(1)), positions[:tokens]
        if tokens < slots.size(0):
            slots = slots[:tokens]
        return (self._half_calls if is_decode else self._flash_calls)(heads, positions, metadata, slots)

    def _is_decode(self, metadata: Any) -> bool:
        """Whether every request has one new token and attention_half is to serve them."""
        return (
            self.decode_reason is None
            and metadata.max_query_len == 1
            and metadata.seq_lens.size(0) == metadata.num_actual_tokens
            and (metadata.max_seq_len < self._longest or self._longest <= GRAPH_TOKENS or self._setting == "half")
        )

    def _ropes(self, heads: Heads, positions: torch.Tensor) -> Iterable[Call]:
        """Norm and rotary embedding of each layer: fused_qk_norm_rope takes the positions last, rotary_embedding first."""
        if self._normed:
            return ((ops.fused_qk_norm_rope, (*rope, positions)) for rope in heads.ropes)
        return ((ops.rotary_embedding, (positions, *rope)) for rope in heads.ropes)

    def _half_calls(self, heads: Heads, positions: torch.Tensor, metadata: Any, slots: Any) -> list[tuple[Call, ...]]:
        op, rest = ops.attention_half, (metadata.block_table, metadata.seq_lens, *self._rest_of_half(metadata.max_seq_len))
        return [
            ((op, (*half, positions, slots, cache, *rest)),) for half, cache in zip(heads.halves, self._caches, strict=True)
        ]

    def _flash_calls(self, heads: Heads, positions: torch.Tensor, metadata: Any, slots: Any) -> list[tuple[Call, ...]]:
        attend, q, rest = torch.ops._vllm_fa3_C.fwd.default._op, heads.q, self._rest_of_fwd(heads.out, metadata)
        attends = [(attend, (q, keys, values, *rest)) for keys, values, *_ in self._views]
        if self.write_reason is None:
            op = ops.fused_qk_norm_rope_cache
            return [
                ((op, (*write, positions, slots, cache)), attention)
                for write, cache, attention in zip(heads.writes, self._caches, attends, strict=True)
            ]
        write, k, v = torch.ops._C_cache_ops.reshape_and_cache_flash.default._op, heads.k, heads.v
        return [
            (rope, (write, (k, v, keys, values, slots, "auto", *scales)), attention)
            for rope, (keys, values, *scales), attention in zip(
                self._ropes(heads, positions), self._views, attends, strict=True
            )
        ]

    def _rest_of_half(self, max_seq_len: int) -> tuple[Any, ...]:
        """The arguments of attention_half after the lengths."""
        weights = self._weights
        return max_seq_len, self._scale, weights.epsilon, self._group, weights.neox

    def _rest_of_fwd(self, out: torch.Tensor, metadata: Any) -> tuple[Any, ...]:
        """What follows q, k and v in a call of FlashAttention 3's fwd; the same for every layer of a step."""
        return (
            *(None, None, None, out, metadata.query_start_loc, None, None, None),
            *(metadata.seq_lens, metadata.max_query_len, metadata.max_seq_len, metadata.block_table),
            *(None, None, None, None, None, None, None, None),
            *(self._scale, metadata.causal, -1, -1, 0.0, True),
            *(metadata.scheduler_metadata, metadata.max_num_splits, None, 0, None, 1, 0, None),
        )
