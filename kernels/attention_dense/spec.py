"""attention_dense: attention of every sequence of a batch over its own keys, in the layout of torch's SDPA."""

from __future__ import annotations

from typing import Any

import torch
from hdispatch.errors import ArgumentError
from hdispatch.opspec import Fallback, IntArg, OpSpec, TensorArg, Variant

from ..lib import sdpa

NAME = "attention_dense"


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
    q        bfloat16, float16 or float32 [M, N, queries, K], last dimension contiguous: M sequences, N heads
    k, v     [M, kv heads, keys, K], dtype of q, last dimension contiguous; N is a multiple of kv heads, and each of them is
             that of N / kv heads heads of q in turn
    max_seqlen_q
             picks the config; queries, where nothing else is wanted
    scale    factor of q k^T
    softcap  c > 0: scores s become c * tanh(s / c); 0: they stay
    window   w > 0: a query sees no key that is w or more behind its own; 0: all of them
    causal   whether a query sees no key behind its own; the last query's own is the last key
    limits   whether softcap and window count; without it both are 0

    Scores, softmax and sums are float32. A query that sees no key gives zeros.
    """
    out.copy_(sdpa.attend(q, k, v, _checked(out, q, k, v, scale, softcap, window, causal, limits)))


def fallback(out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, _max_seqlen_q: int, *rule: Any) -> None:
    """The op by torch's scaled_dot_product_attention."""
    out.copy_(sdpa.serve(q, k, v, _checked(out, q, k, v, *rule)))


def _checked(out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rule: Any) -> sdpa.Rule:
    """ArgumentError for what the declaration cannot say."""
    sdpa.check_heads(NAME, q, k, v)
    if out.shape != q.shape:
        raise ArgumentError(f"{NAME}: out is {list(out.shape)}; expected q's shape, {list(q.shape)}")
    return sdpa.checked_rule(NAME, *rule)


def sample(variant: Variant, sizes: dict[str, int], device: torch.device, generator: torch.Generator) -> list[Any]:
    """Random arguments, as many keys as queries; `OpSpec` says the rest."""
    m, longest = sizes["M"], sizes.get("max_seqlen_q", sdpa.LONGEST)
    q, k, v = (
        torch.randn(m, heads, longest, sizes["K"], generator=generator, device=generator.device).to(device, variant.dtypes["q"])
        for heads in sdpa.sample_heads(sizes["N"])
    )
    return [torch.full_like(q, float("nan")), q, k, v, longest, *sdpa.sample_rule(variant, sizes["K"], longest)]


SPEC = OpSpec(
    name=NAME,
    args=(
        TensorArg("out", ("M", "N", "*", "K"), "q", mutated=True, layout="any", multiple=16),
        TensorArg("q", ("M", "N", "*", "K"), sdpa.DTYPES, layout="any", multiple=16),
        TensorArg("k", ("M", "*", "*", "K"), "q", layout="any", multiple=16),
        TensorArg("v", ("M", "*", "*", "K"), "q", layout="any", multiple=16),
        IntArg("max_seqlen_q", minimum=1, ladder=sdpa.LENGTHS),
        *sdpa.RULE_ARGS,
    ),
    reference=reference,
    fallback=Fallback(fallback),
    accumulation=1e-7,  # of float32: torch's kernels add up in another order
    sample=sample,
    config_key={"head_dim": "K", "num_sequences": "M", "max_seqlen_q": "max_seqlen_q"},
    ladder=(4,),  # the number of sequences picks no config
    **sdpa.DENSE,
)
