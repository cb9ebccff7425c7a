"""Attention of a step, with all that lies between the qkv product and its output: as calls of each layer.

Steps of one new token per request, pure decode, are one call of attention_half per layer. Others are rotary embedding, vLLM's
cache write and FlashAttention 3, called without vLLM's Python around them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from ... import ops
from . import settings
from .schemes import Call
from .support import loaded_ladder, objection
from .weights import Weights, plain

#: A folder of its own in a checkout, which mypy does not find.
_WORKSPACE = importlib.import_module("hdispatch.kernels.lib.workspace")

#: Longest model whose CUDA graphs take attention_half. vLLM captures one graph for all lengths, as if every request had
#: max_model_len tokens. FlashAttention 3 then splits requests by their lengths on the device; attention_half has as many blocks
#: as the longest length asks for, and the graph has no host time that it could save.
GRAPH_TOKENS = 8192


@dataclass(frozen=True)
class Heads:
    """Some rows of a step as attention takes them, and of each layer the arguments that are known before the step.

    qkv    [tokens, heads + 2 * kv heads of head size elements], with q, k, v [tokens, heads or kv heads, head size] of it
    out    [tokens, heads, head size]
    ropes  of the rotary embedding, without the positions
    halves of attention_half, those before the positions
    """

    qkv: torch.Tensor
    out: torch.Tensor
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    ropes: tuple[tuple[Any, ...], ...]
    halves: tuple[tuple[Any, ...], ...]


class Attention:
    """Attention of a model's layers on one device and stream.

    weights        of the layers
    longest        tells the tokens of the longest request, vLLM's max_model_len, which vLLM may set when it knows its memory
    most           requests of a step, vLLM's max_num_seqs
    canonical      gives dimensions of size 1 the stride that a contiguous tensor has
    former         of weights that are no more: its workspace is used again, since graphs may have been captured with it
    decode_reason  why decode steps take FlashAttention 3 too; None if they take attention_half. Decided by `bind`.

    Call `is_bound` before each step that has caches, and `bind` where it says no: vLLM replaces the caches after profiling and
    on waking up.
    """

    def __init__(
        self,
        weights: Weights,
        longest: Callable[[], int],
        most: int,
        canonical: Callable[[torch.Tensor], torch.Tensor],
        former: Attention | None = None,
    ) -> None:
        self._weights, self._tell_longest, self._most, self._canonical = weights, longest, most, canonical
        self._longest = 0
        self._layers = [layer.attention for layer in weights.layers]
        self._scale = self._layers[0].impl.scale
        self._group = weights.shape.heads // weights.shape.kv_heads
        self._first = self._last = None
        self._caches: list[torch.Tensor] = []
        self._views: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]] = []
        size, device = _WORKSPACE.workspace_floats(weights.shape.head_size), weights.embedding.device
        kept = None if former is None else former._workspace
        fits = kept is not None and (kept.numel(), kept.device) == (size, device)
        self._workspace: torch.Tensor = kept if kept is not None and fits else torch.zeros(size, device=device)
        self._normed = weights.layers[0].q_norm is not None
        self._setting = settings.attention()
        self._said: str | None = ""
        self.decode_reason: str | None = "no step has had caches yet"

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
        self.decode_reason = self._decide()
        if self.decode_reason != self._said:
            self._said = self.decode_reason
            what = "attention_half" if self._said is None else f"FlashAttention 3: {self._said}"
            settings.logger.info("hdispatch: decode steps take %s", what)

    def _decide(self) -> str | None:
        """Why the launch table does not serve attention_half at some number of requests; None if it does at all of them."""
        if self._setting == "fa3":
            return f"{settings.ATTENTION} is fa3"
        device = self._caches[0].device
        ladder = loaded_ladder("attention_half", device)
        if not ladder and device.type != "cuda":  # the reference serves
            return None
        for requests in sorted({min(edge, self._most) for edge in (*ladder, self._most)}):
            for length in (1, self._longest):
                reason = objection(ops.attention_half, *self._example(requests, length))
                if reason is not None:
                    return reason
        return None

    def _example(self, requests: int, length: int) -> tuple[Any, ...]:
        """Arguments as those of a decode step of the first layer, to ask about, not to run."""
        shape, weights, device = self._weights.shape, self._weights, self._caches[0].device
        qkv = torch.empty(requests, shape.qkv, dtype=weights.dtype, device=device)
        heads = self.plan(qkv, torch.empty(requests, shape.attended, dtype=weights.dtype, device=device))
        long = torch.empty(requests, dtype=torch.int64, device=device)
        short = torch.empty(requests, dtype=torch.int32, device=device)
        return (*heads.halves[0], long, long, self._caches[0], short.view(requests, 1), short, *self._rest_of_half(length))

    # ---- a step ----

    def plan(self, qkv: torch.Tensor, attended: torch.Tensor) -> Heads:
        """Views of qkv [tokens, …] and of the output [tokens, heads * head size], and every layer's arguments."""
        weights, shape, tokens = self._weights, self._weights.shape, qkv.size(0)
        heads = qkv.view(tokens, shape.heads + 2 * shape.kv_heads, shape.head_size)
        q, k, v = torch.split(heads, [shape.heads, shape.kv_heads, shape.kv_heads], dim=1)
        out = attended.view(tokens, shape.heads, shape.head_size)
        halves = tuple((out, qkv, layer.q_norm, layer.k_norm, weights.rope_cache) for layer in weights.layers)
        ropes: tuple[tuple[Any, ...], ...]
        if self._normed:
            sizes = (shape.heads, shape.kv_heads, shape.kv_heads, shape.head_size, weights.epsilon)
            ropes = tuple((qkv, *sizes, *half[2:], weights.neox) for half in halves)
        else:
            flat_q, flat_k = qkv[:, : shape.attended], qkv[:, shape.attended : -shape.kv_heads * shape.head_size]
            ropes = ((flat_q, flat_k, shape.head_size, weights.rope_cache, weights.neox),) * len(halves)
        return Heads(qkv, out, q, k, v, ropes, halves)

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
        if self._is_decode(metadata):
            return self._half_calls(heads, positions, metadata, slots)
        write, attend = torch.ops._C_cache_ops.reshape_and_cache_flash.default._op, torch.ops._vllm_fa3_C.fwd.default._op
        q, k, v, shared = heads.q, heads.k, heads.v, self._rest_of_fwd(heads.out, metadata)
        return [
            (rope, (write, (k, v, keys, values, slots, "auto", *scales)), (attend, (q, keys, values, *shared)))
            for rope, (keys, values, *scales) in zip(self._ropes(heads, positions), self._views, strict=True)
        ]

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
        table, lengths = metadata.block_table, metadata.seq_lens
        requests = lengths.size(0)
        if requests != positions.size(0):  # padding that vLLM has no requests for
            heads = self.plan(heads.qkv[:requests], heads.out[:requests].flatten(1))
            positions = positions[:requests]
        if requests != slots.size(0):
            slots = slots[:requests]
        rest = (table, lengths, *self._rest_of_half(metadata.max_seq_len))
        op = ops.attention_half
        return [
            ((op, (*half, positions, slots, cache, *rest)),) for half, cache in zip(heads.halves, self._caches, strict=True)
        ]

    def _rest_of_half(self, max_seq_len: int) -> tuple[Any, ...]:
        """The arguments of attention_half after the lengths."""
        weights = self._weights
        return self._workspace, max_seq_len, self._scale, weights.epsilon, self._group, weights.neox

    def _rest_of_fwd(self, out: torch.Tensor, metadata: Any) -> tuple[Any, ...]:
        """What follows q, k and v in a call of FlashAttention 3's fwd; the same for every layer of a step."""
        return (
            *(None, None, None, out, metadata.query_start_loc, None, None, None),
            *(metadata.seq_lens, metadata.max_query_len, metadata.max_seq_len, metadata.block_table),
            *(None, None, None, None, None, None, None, None),
            *(self._scale, metadata.causal, -1, -1, 0.0, True),
            *(metadata.scheduler_metadata, metadata.max_num_splits, None, 0, None, 1, 0, None),
        )
