"""The Triton kernel of attention_varlen: that of kernels/lib/flash_attention.py."""

from __future__ import annotations

from typing import Any

from hdispatch.opspec import Variant

from ..lib import flash_attention as lib

GENERIC = ("N",)


def launch(
    out, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, _max_seqlen_k, scale, softcap, window, causal, limits, *,
    config, _launcher,
):  # fmt: skip
    """The kernel reads lengths of keys on the device: max_seqlen_k is the fallback's."""
    starts, rule = (cu_seqlens_q, cu_seqlens_k), lib.Rule(scale, softcap, window, causal, limits)
    lib.launch_packed("attention_varlen", (out, q, k, v), starts, max_seqlen_q, rule, config, _launcher)


def candidates(sizes: dict[str, int], _variant: Variant) -> list[dict[str, Any]]:
    """Configs worth measuring."""
    return lib.candidates(sizes)
