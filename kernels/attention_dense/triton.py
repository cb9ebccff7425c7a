"""The Triton kernel of attention_dense: that of kernels/lib/flash_attention.py."""

from __future__ import annotations

from typing import Any

from hdispatch.opspec import Variant

from ..lib import flash_attention as lib

GENERIC = ("N",)


def launch(out, q, k, v, _max_seqlen_q, scale, softcap, window, causal, limits, *, config, _launcher):
    """max_seqlen_q only picked the config."""
    rule = lib.Rule(scale, softcap, window, causal, limits)
    lib.launch_dense("attention_dense", (out, q, k, v), rule, config, _launcher)


def candidates(sizes: dict[str, int], _variant: Variant) -> list[dict[str, Any]]:
    """Configs worth measuring."""
    return lib.candidates(sizes)
