"""The Triton kernel of attention_varlen: that of kernels/lib/flash_attention.py."""

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
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,  # noqa: ARG001
    scale: float,
    softcap: float,
    window: int,
    causal: bool,
    limits: bool,
    *,
    config: dict[str, Any],
    _launcher: Callable[..., None],
) -> None:
    """The kernel reads lengths of keys on the device: max_seqlen_k is the fallback's."""
    starts = (cu_seqlens_q, cu_seqlens_k)
    lib.launch_packed(
        "attention_varlen", out, q, k, v, starts, max_seqlen_q, scale, softcap, window, causal, limits, config, _launcher
    )


def candidates(sizes: dict[str, int], _variant: Variant) -> list[dict[str, Any]]:
    """Configs worth measuring."""
    return lib.candidates(sizes)
