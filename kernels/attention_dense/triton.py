"""The Triton kernel of attention_dense: that of kernels/lib/flash_attention.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hdispatch.opspec import Variant

from ..lib import flash_attention as lib

GENERIC = ("N",)
INDEX_BITS = 64


def launch(
    out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    max_seqlen_q: int,  # noqa: ARG001
    scale: float,
    softcap: float,
    window: int,
    causal: bool,
    limits: bool,
    *,
    config: dict[str, Any],
    _launcher: Callable[..., None],
) -> None:
    """max_seqlen_q only picked the config."""
    lib.launch_dense("attention_dense", out, q, k, v, scale, softcap, window, causal, limits, config, _launcher)


def candidates(sizes: dict[str, int], _variant: Variant) -> list[dict[str, Any]]:
    """Configs worth measuring."""
    return lib.candidates(sizes)
