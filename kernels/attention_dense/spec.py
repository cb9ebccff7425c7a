"""attention_dense: attention of every sequence of a batch over its own keys, in the layout of torch's SDPA."""

from __future__ import annotations

import math
from typing import Any

import torch
from hdispatch.errors import ArgumentError
from hdispatch.opspec import BoolArg, FloatArg, IntArg, OpSpec, TensorArg, Variant

from ..lib.sdpa import Rule, attend, serve

NAME = "attention_dense"

#: Upper edges of the buckets of max_seqlen_q.
LENGTHS = (1, 16, 128, 512, 1024, 2048, 4096, 8192, 16384)
#: Queries of a sample call, unless it is asked for, and query heads per kv head.
LONGEST, GROUP = 100, 4


def reference(
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
) -> None:
    """The op in torch, forward only.

    out      [M, N, queries, K], dtype of q, written
    q        bfloat16 or float16 [M, N, queries, K], last dimension contiguous: M sequences, N heads
    k, v     [M, kv heads, keys, K], dtype of q, last dimension contiguous; N is a multiple of kv heads, and each of them is
             that of N / kv heads heads of q in turn
    max_seqlen_q
             picks the config; queries, where nothing else is wanted
    scale    factor of q k^T
    softcap  c > 0: scores s become c * tanh(s / c); 0: they stay
    window   w > 0, with causal: a query sees the newest w keys up to its own; 0: all of them
    causal   whether a query sees no key behind its own; the last query's own is the last key
    limits   whether softcap and window count; without it both are 0

    Scores, softmax and sums are float32. A query that sees no key gives zeros.
    """
    out.copy_(attend(q, k, v, _checked(q, k, v, out, scale, softcap, window, causal, limits)))


def fallback(
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
) -> None:
    """The op by torch's scaled_dot_product_attention."""
    out.copy_(serve(q, k, v, _checked(q, k, v, out, scale, softcap, window, causal, limits)))


def _checked(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    scale: float,
    softcap: float,
    window: int,
    causal: bool,
    limits: bool,
) -> Rule:
    """ArgumentError for what the declaration cannot say."""
    check_rule(NAME, softcap, window, causal, limits)
    if q.size(1) % max(1, k.size(1)) or (k.size(1) == 0 and q.size(1)):
        raise ArgumentError(f"{NAME}: q has {q.size(1)} heads; expected a multiple of k's, which has {k.size(1)}")
    if k.shape != v.shape:
        raise ArgumentError(f"{NAME}: v is {list(v.shape)}; expected k's shape, {list(k.shape)}")
    if out.shape != q.shape:
        raise ArgumentError(f"{NAME}: out is {list(out.shape)}; expected q's shape, {list(q.shape)}")
    return Rule(scale, softcap, window, causal)


def check_rule(op: str, softcap: float, window: int, causal: bool, limits: bool) -> None:
    """ArgumentError for a softcap or window without `limits`, or a window without `causal`."""
    if not limits and (softcap or window):
        raise ArgumentError(f"{op}: softcap is {softcap} and window {window}; without limits both are 0")
    if window and not causal:
        raise ArgumentError(f"{op}: window is {window}; without causal it is 0")


def sample(variant: Variant, sizes: dict[str, int], device: torch.device, generator: torch.Generator) -> list[Any]:
    """Random arguments, as many keys as queries; `OpSpec` says the rest."""
    m, dim, dtype = sizes["M"], sizes["K"], variant.dtypes["q"]
    kv_heads = max(1, sizes["N"] // GROUP) if sizes["N"] % GROUP == 0 else sizes["N"]
    longest = sizes.get("max_seqlen_q", LONGEST)
    q, k, v = (
        torch.randn(m, heads, longest, dim, generator=generator, device=generator.device).to(device=device, dtype=dtype)
        for heads in (sizes["N"], kv_heads, kv_heads)
    )
    return [torch.full_like(q, float("nan")), q, k, v, longest, 1 / math.sqrt(dim), *rule_of(variant, longest)]


def rule_of(variant: Variant, longest: int) -> tuple[float, int, bool, bool]:
    """softcap, window, causal and limits of a sample call."""
    causal, limits = bool(variant.static["causal"]), bool(variant.static["limits"])
    return (30.0 if limits else 0.0), (1 + longest // 2 if limits and causal else 0), causal, limits


def served(variant: Variant) -> bool:
    """What models have: a softcap and windows with causal, in bfloat16."""
    return not variant.static["limits"] or (bool(variant.static["causal"]) and variant.dtypes["q"] == torch.bfloat16)


SPEC = OpSpec(
    name=NAME,
    args=(
        TensorArg("out", ("M", "N", "*", "K"), "q", mutated=True, layout="any", multiple=16),
        TensorArg("q", ("M", "N", "*", "K"), (torch.bfloat16, torch.float16), layout="any", multiple=16),
        TensorArg("k", ("M", "*", "*", "K"), "q", layout="any", multiple=16),
        TensorArg("v", ("M", "*", "*", "K"), "q", layout="any", multiple=16),
        IntArg("max_seqlen_q", minimum=1, ladder=LENGTHS),
        FloatArg("scale", minimum=0.0),
        FloatArg("softcap", minimum=0.0),
        IntArg("window", minimum=0),
        BoolArg("causal"),
        BoolArg("limits"),
    ),
    reference=reference,
    fallback=fallback,
    sample=sample,
    shapes=({"K": 128}, {"K": 64}, {"K": 256}),
    config_key={"head_dim": "K", "num_sequences": "M", "max_seqlen_q": "max_seqlen_q"},
    ladder=(4,),  # the number of sequences picks no config
    hints={"N": 32},
    doc=reference.__doc__ or "",
    own_scales=True,
    served=served,
    typical="bfloat16+causal",
)
