"""Attention of a step, with all that lies between the qkv product and its output: as steps of a sequence.

Steps of one new token per request, pure decode, are one launch of attention_half per layer. Others are fused_qk_norm_rope_cache
and FlashAttention 3, which is called without vLLM's Python around it; where the bundle has no rows of the former, rotary
embedding and vLLM's cache write.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any

import torch

from ... import ops
from ...sequence import Sequence, SequenceTensor
from . import settings
from .support import loaded_ladders, objection
from .weights import Weights, plain

#: Longest model whose CUDA graphs take attention_half. vLLM captures one graph for all lengths, as if every request had
#: max_model_len tokens. FlashAttention 3 then splits requests by their lengths on the device; attention_half has as many blocks
#: as the longest length asks for, and the graph has no host time that it could save.
GRAPH_TOKENS = 8192


#: Most rows that the launch table is asked about, when vLLM has given nearly all memory to the caches: 20 MB of an 8B model.
ASKED_ROWS = 1024


#: Of `max_seq_len`, as attention_half gets it, in tokens, behind the last edge of its buckets.
LENGTH_STEP = 1024


class Kind(enum.Enum):
    """The kind of attention of a step."""

    NOTHING = "a step without caches: vLLM's memory profile"
    HALF = "attention_half"
    FLASH = "FlashAttention 3"


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
        self._edges: tuple[int, ...] = ()  # of the buckets of max_seq_len
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
        self._edges = tuple(loaded_ladders(ops.attention_half.name, self._caches[0].device).second)
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
        """Arguments of attention_half as in a decode step of the first layer, to look up a row, not to launch."""
        weights, layer, shape = self._weights, self._weights.layers[0], self._weights.shape
        qkv, long = self._example(requests)
        out = qkv.new_empty(requests, shape.heads, shape.head_size)
        short = torch.empty(requests, dtype=torch.int32, device=long.device)
        turn = layer.q_norm, layer.k_norm, weights.rope_cache
        return (out, qkv, *turn, long, long, self._caches[0], short.view(requests, 1), short, *self._rest_of_half(length))

    def _write_example(self, tokens: int, _: int) -> tuple[Any, ...]:
        """Arguments of fused_qk_norm_rope_cache, likewise."""
        weights, layer, shape = self._weights, self._weights.layers[0], self._weights.shape
        qkv, long = self._example(tokens)
        sizes = shape.heads, shape.kv_heads, shape.head_size, weights.epsilon
        turn = layer.q_norm, layer.k_norm, weights.rope_cache
        return (qkv, *sizes, *turn, weights.neox, long, long, self._caches[0])

    def _example(self, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A qkv product, and what has the form of positions and slots."""
        device = self._caches[0].device
        qkv = torch.empty(rows, self._weights.shape.qkv, dtype=self._weights.dtype, device=device)
        return qkv, torch.empty(rows, dtype=torch.int64, device=device)

    # ---- the steps of a sequence ----

    def kind(self, metadata: Any) -> Kind:
        """The attention that serves a step with vLLM's FlashAttentionMetadata, or with None where there are no caches."""
        if metadata is None:
            return Kind.NOTHING
        return Kind.HALF if self._is_decode(metadata) else Kind.FLASH

    def _is_decode(self, metadata: Any) -> bool:
        """Whether every request has one new token and attention_half is to serve them."""
        return (
            self.decode_reason is None
            and metadata.max_query_len == 1
            and metadata.seq_lens.size(0) == metadata.num_actual_tokens
            and (metadata.max_seq_len < self._longest or self._longest <= GRAPH_TOKENS or self._setting == "half")
        )

    def declare(self, s: Sequence, kind: Kind) -> dict[str, Any]:
        """The slots that steps of a kind have: `given` has their values, in the same order."""
        found: dict[str, Any] = {"positions": s.slot("positions", ("M",), torch.int64)}
        if kind is Kind.NOTHING:
            return found
        found["slot_mapping"] = s.slot("slot_mapping", ("M",), torch.int64)
        if kind is Kind.HALF:
            found["block_table"] = s.slot("block_table", ("M", "*"), torch.int32)
            found["seq_lens"] = s.slot("seq_lens", ("M",), torch.int32)
            return found | {"max_seq_len": s.int_slot("max_seq_len")}
        found |= {name: s.slot(name, None, torch.int32) for name in ("block_table", "seq_lens", "query_start_loc")}
        found["scheduler_metadata"] = s.slot("scheduler_metadata", None, torch.int32, optional=True)
        return found | {name: s.int_slot(name) for name in ("max_query_len", "max_seq_len", "causal", "max_num_splits")}

    def given(self, kind: Kind, positions: torch.Tensor, metadata: Any, slots: Any) -> tuple[Any, ...]:
        """The values of a step's slots.

        positions  int64 [M]
        slots      int64: where the cache gets each token's K and V; negative: nowhere

        vLLM may have requests or slots for some of the tokens only. The rest is padding: what is left in its rows of the output
        does not matter.
        """
        if kind is Kind.NOTHING:
            return (positions,)
        rows, found = positions.size(0), metadata
        slots = _with_rows(slots, rows, -1)
        if kind is Kind.HALF:
            longest = self._rounded(found.max_seq_len)
            table = _with_rows(found.block_table, rows, 0)
            return positions, slots, table, _with_rows(found.seq_lens, rows, 0), longest
        tensors = found.block_table, found.seq_lens, found.query_start_loc, found.scheduler_metadata
        return positions, slots, *tensors, found.max_query_len, found.max_seq_len, found.causal, found.max_num_splits

    def _rounded(self, length: int) -> int:
        """The end of the length's bucket, or the longest request's.

        Calls with other arguments are resolved or captured anew, and a decode step's length grows each time. Blocks for tokens
        that no request has leave at once.
        """
        edge = next((edge for edge in self._edges if edge >= length), -(-length // LENGTH_STEP) * LENGTH_STEP)
        return min(edge, max(self._longest, length))

    def add(self, s: Sequence, kind: Kind, slots: dict[str, Any], n: int, qkv: SequenceTensor, out: SequenceTensor) -> None:
        """The steps of layer n from `qkv`, [M, (heads + 2 * kv heads) * head size], to `out`, [M, heads * head size]."""
        layer, weights, shape = self._weights.layers[n], self._weights, self._weights.shape
        heads, kv_heads, size = shape.heads, shape.kv_heads, shape.head_size
        turn = layer.q_norm, layer.k_norm, weights.rope_cache
        if kind is Kind.NOTHING:  # first, so that both buffers matter at once as in every other step
            s.add_torch(torch.ops.aten.zero_.default, out)
            self._add_rope(s, slots, n, qkv)
            return
        if kind is Kind.HALF:
            cached = slots["slot_mapping"], self._caches[n], slots["block_table"], slots["seq_lens"]
            rest = self._rest_of_half(slots["max_seq_len"])
            s.add(ops.attention_half, out.view("M", heads, size), qkv, *turn, slots["positions"], *cached, *rest)
            return
        if self.write_reason is None:
            sizes = heads, kv_heads, size, weights.epsilon
            places = slots["positions"], slots["slot_mapping"]
            s.add(ops.fused_qk_norm_rope_cache, qkv, *sizes, *turn, weights.neox, *places, self._caches[n])
        else:
            self._add_rope(s, slots, n, qkv)
            each = qkv.view("M", heads + 2 * kv_heads, size)
            k, v = each.narrow(1, heads, kv_heads), each.narrow(1, heads + kv_heads, kv_heads)
            keys, values, *scales = self._views[n]
            write = torch.ops._C_cache_ops.reshape_and_cache_flash.default
            s.add_torch(write, k, v, keys, values, slots["slot_mapping"], "auto", *scales)
        self._add_flash(s, slots, n, qkv, out)

    def _add_rope(self, s: Sequence, slots: dict[str, Any], n: int, qkv: SequenceTensor) -> None:
        """Norm and rotary embedding. Not by rows: so qkv is whole in all kinds of steps, and vLLM's memory profile sees it."""
        layer, weights, shape = self._weights.layers[n], self._weights, self._weights.shape
        if self._normed:
            sizes = shape.heads, shape.kv_heads, shape.kv_heads, shape.head_size, weights.epsilon
            turn = layer.q_norm, layer.k_norm, weights.rope_cache
            s.add(ops.fused_qk_norm_rope, qkv, *sizes, *turn, weights.neox, slots["positions"], by_rows=False)
        else:
            q, k = qkv.columns(0, shape.attended), qkv.columns(shape.attended, shape.qkv - shape.kv_heads * shape.head_size)
            rest = shape.head_size, weights.rope_cache, weights.neox
            s.add(ops.rotary_embedding, slots["positions"], q, k, *rest, by_rows=False)

    def _add_flash(self, s: Sequence, slots: dict[str, Any], n: int, qkv: SequenceTensor, out: SequenceTensor) -> None:
        shape, (keys, values, *_) = self._weights.shape, self._views[n]
        q = qkv.view("M", shape.heads + 2 * shape.kv_heads, shape.head_size).narrow(1, 0, shape.heads)
        to = out.view("M", shape.heads, shape.head_size)
        rest = self._rest_of_fwd(to, slots)
        s.add_torch(torch.ops._vllm_fa3_C.fwd.default, q, keys, values, *rest, writes=("out",))

    def _rest_of_half(self, max_seq_len: Any) -> tuple[Any, ...]:
        """The arguments of attention_half after the lengths."""
        weights = self._weights
        return max_seq_len, self._scale, weights.epsilon, self._group, weights.neox

    def _rest_of_fwd(self, out: SequenceTensor, slots: dict[str, Any]) -> tuple[Any, ...]:
        """The arguments after q, k and v in a call of FlashAttention 3's fwd."""
        return (
            *(None, None, None, out, slots["query_start_loc"], None, None, None),
            *(slots["seq_lens"], slots["max_query_len"], slots["max_seq_len"], slots["block_table"]),
            *(None, None, None, None, None, None, None, None),
            *(self._scale, slots["causal"], -1, -1, 0.0, True),
            *(slots["scheduler_metadata"], slots["max_num_splits"], None, 0, None, 1, 0, None),
        )


def _with_rows(tensor: torch.Tensor, rows: int, value: int) -> torch.Tensor:
    """Its first rows, and behind them, where it has fewer, rows of a value."""
    missing = rows - tensor.size(0)
    if missing > 0:
        return torch.nn.functional.pad(tensor, (*(0, 0) * (tensor.dim() - 1), 0, missing), value=value)
    return tensor if missing == 0 else tensor[:rows]
