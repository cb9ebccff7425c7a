"""attention_varlen: attention of packed sequences of any lengths, which lie on the GPU, over their own packed keys."""

from __future__ import annotations

from typing import Any

import torch
from hdispatch.errors import ArgumentError
from hdispatch.opspec import Fallback, IntArg, OpSpec, TensorArg, Variant

from ..lib import sdpa

NAME = "attention_varlen"


def reference(
    out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    softcap: float,
    window: int,
    causal: bool,
    limits: bool,
) -> None:
    """The op in torch, forward only.

    out      [M, N, K], dtype of q, written; rows behind the last sequence stay as they are
    q        bfloat16, float16 or float32 [M, N, K], last dimension contiguous: M tokens of all sequences, N heads
    k, v     [keys, kv heads, K], dtype of q, last dimension contiguous; N is a multiple of kv heads, and each of them is that
             of N / kv heads heads of q in turn
    cu_seqlens_q, cu_seqlens_k
             int32 [sequences + 1]: sequence i has the rows cu_seqlens_q[i] to cu_seqlens_q[i + 1] of q and out, and likewise
             of k and v. Ascending from 0; sequences may be empty
    max_seqlen_q, max_seqlen_k
             at least the most queries and keys of a sequence
    scale    factor of q k^T
    softcap  c > 0: scores s become c * tanh(s / c); 0: they stay
    window   w > 0: a query sees no key that is w or more behind its own; 0: all of them
    causal   whether a query sees no key behind its own; a sequence's last query's own is its last key
    limits   whether softcap and window count; without it both are 0

    Scores, softmax and sums are float32. A query that sees no key gives zeros.
    """
    packed = sdpa.Packed(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    sdpa.by_padding(out, packed, _checked(packed, scale, softcap, window, causal, limits), exact=True)


def fallback(out: torch.Tensor, *arguments: Any) -> None:
    """The op by torch's scaled_dot_product_attention, of padded sequences: lengths need not come to the host."""
    packed = sdpa.Packed(*arguments[:7])
    sdpa.by_padding(out, packed, _checked(packed, *arguments[7:]), exact=False)


def _checked(packed: sdpa.Packed, *rule: Any) -> sdpa.Rule:
    """ArgumentError for what the declaration cannot say."""
    sdpa.check_heads(NAME, *packed[:3])
    starts_q, starts_k = packed.cu_seqlens_q, packed.cu_seqlens_k
    if starts_q.size(0) != starts_k.size(0) or not starts_q.size(0):
        raise ArgumentError(
            f"{NAME}: cu_seqlens_q has {starts_q.size(0)} numbers and cu_seqlens_k {starts_k.size(0)}; expected as many, "
            "one more than sequences"
        )
    return sdpa.checked_rule(NAME, *rule)


def sample(variant: Variant, sizes: dict[str, int], device: torch.device, generator: torch.Generator) -> list[Any]:
    """Random arguments: the first sequence has the longest length, if there are as many tokens, the last ones are empty."""
    m, dim = sizes["M"], sizes["K"]
    longest = min(sizes.get("max_seqlen_q", sdpa.LONGEST), max(1, m))
    cuts = list(range(longest, m, max(1, longest - 1)))
    starts = torch.tensor([0, *(cuts if m > longest else []), m, m], dtype=torch.int32).to(device)
    q, k, v = (
        torch.randn(m, heads, dim, generator=generator, device=generator.device).to(device=device, dtype=variant.dtypes["q"])
        for heads in sdpa.sample_heads(sizes["N"])
    )
    longest = max(longest, sizes.get("max_seqlen_q", 1))
    lengths = (starts, starts.clone(), longest, longest)
    return [torch.full_like(q, float("nan")), q, k, v, *lengths, *sdpa.sample_rule(variant, dim, longest)]


SPEC = OpSpec(
    name=NAME,
    args=(
        TensorArg("out", ("M", "N", "K"), "q", mutated=True, layout="any", multiple=16),
        TensorArg("q", ("M", "N", "K"), sdpa.DTYPES, layout="any", multiple=16),
        TensorArg("k", ("*", "*", "K"), "q", layout="any", multiple=16),
        TensorArg("v", ("*", "*", "K"), "q", layout="any", multiple=16),
        TensorArg("cu_seqlens_q", ("*",), (torch.int32,)),
        TensorArg("cu_seqlens_k", ("*",), (torch.int32,)),
        IntArg("max_seqlen_q", minimum=1, ladder=sdpa.LENGTHS),
        IntArg("max_seqlen_k", minimum=1),
        *sdpa.RULE_ARGS,
    ),
    reference=reference,
    fallback=Fallback(fallback),
    accumulation=1e-7,  # of float32: torch's kernels add up in another order
    sample=sample,
    config_key={"head_dim": "K", "num_tokens": "M", "max_seqlen_q": "max_seqlen_q"},
    ladder=(16384,),  # the number of tokens picks no config
    **sdpa.DENSE,
)
