"""Paged attention of a step: vLLM's cache write and FlashAttention 3, called without vLLM's Python around them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .weights import Layer, plain


class FlashAttention3:
    """What all layers of a model share: K and V views of their caches, and the arguments of a step.

    Call `is_bound` before each step, and `bind` where it says no: vLLM replaces the caches after profiling and on waking up.
    """

    def __init__(self, layers: tuple[Layer, ...], scale: float, canonical: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._layers = [layer.attention for layer in layers]
        self._scale, self._canonical = scale, canonical
        self._first = self._last = None
        self.caches: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self.write = torch.ops._C_cache_ops.reshape_and_cache_flash.default._op
        self.attend = torch.ops._vllm_fa3_C.fwd.default._op

    def is_bound(self) -> bool:
        """Whether the caches are those that `bind` saw."""
        return self._layers[0].kv_cache is self._first and self._layers[-1].kv_cache is self._last

    def bind(self) -> None:
        """Make the K and V views of every layer's cache, as FlashAttentionImpl.forward does on each call."""
        self.caches = []
        for attention in self._layers:
            k, v = attention.kv_cache.transpose(1, 2).split(attention.head_size, dim=-1)
            scales = plain(attention._k_scale), plain(attention._v_scale)
            self.caches.append((self._canonical(k), self._canonical(v), *scales))
        self._first, self._last = self._layers[0].kv_cache, self._layers[-1].kv_cache

    def arguments(self, out: torch.Tensor, metadata: Any) -> tuple[Any, ...]:
        """What follows q, k and v in a call of FlashAttention 3's fwd; the same for every layer of a step.

        out       [tokens, heads, head size]
        metadata  vLLM's FlashAttentionMetadata
        """
        return (
            *(None, None, None, out, metadata.query_start_loc, None, None, None),
            *(metadata.seq_lens, metadata.max_query_len, metadata.max_seq_len, metadata.block_table),
            *(None, None, None, None, None, None, None, None),
            *(self._scale, metadata.causal, -1, -1, 0.0, True),
            *(metadata.scheduler_metadata, metadata.max_num_splits, None, 0, None, 1, 0, None),
        )
