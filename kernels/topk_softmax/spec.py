"""topk_softmax: the experts of each token and their weights, from the router's logits, as the op of vLLM."""

from __future__ import annotations

from typing import Any

import torch
from hdispatch.errors import ArgumentError
from hdispatch.opspec import BoolArg, OpSpec, TensorArg, Variant, VllmOp

from ..lib.model_sizes import experts

NAME = "topk_softmax"

INT, FLOAT = (torch.int32,), (torch.float32,)
#: Experts per token in samples that do not say how many.
TOPK = 8


def reference(
    topk_weights: torch.Tensor,
    topk_indices: torch.Tensor,
    token_expert_indices: torch.Tensor,
    gating_output: torch.Tensor,
    renormalize: bool,
    bias: torch.Tensor | None = None,
    is_padding: torch.Tensor | None = None,
) -> None:
    """The op in torch.

    topk_weights          float32 [M, A], written: the softmax of the chosen experts' logits, the largest choice first
    topk_indices          int32 or int64 [M, A], written: the experts; all -1 in a row of padding
    token_expert_indices  int32 [M, A], written: a * M + m for the a-th choice of token m
    gating_output         bfloat16, float16 or float32 [M, N]: logits of N experts; N is at least A
    renormalize           whether a row's weights are divided by their sum, if that is more than 0
    bias                  float32 [N] of finite numbers, or None: added to the softmax to choose by, not to the weights
    is_padding            bool [M], or None: rows of which nobody wants the experts

    The softmax is over all N, in float32. Of equal ones the expert with the lower number comes first. In a row with a NaN, an
    infinity, or nothing but minus infinities the softmax is 0 for all experts; weights are then 0, renormalized or not.
    """
    topk, experts = topk_weights.size(1), gating_output.size(1)
    if topk > experts:
        raise ArgumentError(
            f"{NAME}: topk_weights has {topk} columns; expected at most {experts}, the columns of gating_output"
        )
    softmax = torch.softmax(gating_output.float(), dim=-1)
    softmax = torch.where(softmax.isfinite(), softmax, torch.zeros_like(softmax))
    choice = softmax if bias is None else softmax + bias
    chosen = torch.sort(choice, dim=-1, descending=True, stable=True).indices[:, :topk]
    weights = softmax.gather(1, chosen)
    if renormalize:
        total = weights.sum(dim=-1, keepdim=True)
        weights = weights / torch.where(total > 0, total, torch.ones_like(total))
    topk_weights.copy_(weights)
    topk_indices.copy_(chosen if is_padding is None else chosen.masked_fill(is_padding[:, None], -1))
    tokens = topk_weights.size(0)
    order = torch.arange(topk * tokens, dtype=torch.int32, device=topk_weights.device)
    token_expert_indices.copy_(order.view(topk, tokens).t())


def sample(variant: Variant, sizes: dict[str, int], device: torch.device, generator: torch.Generator) -> list[Any]:
    """Random arguments. Logits have 8 bits, as a router in bfloat16 computes them: equal ones are frequent."""
    m, n = sizes["M"], sizes["N"]
    topk = min(sizes.get("A", TOPK), n)
    logits = torch.randn(m, n, generator=generator, device=device).to(torch.bfloat16).to(variant.dtypes["gating_output"])
    bias = torch.randn(n, generator=generator, device=device) / n if "bias" in variant.dtypes else None
    padding = None
    if "is_padding" in variant.dtypes:
        padding = torch.rand(m, generator=generator, device=device) < 0.25
    return [
        torch.full((m, topk), float("nan"), device=device),
        torch.full((m, topk), -7, dtype=variant.dtypes["topk_indices"], device=device),
        torch.full((m, topk), -7, dtype=torch.int32, device=device),
        logits,
        bool(variant.static["renormalize"]),
        bias,
        padding,
    ]


def served(variant: Variant) -> bool:
    """What vLLM's routers of Qwen3 call it with, from bfloat16 and float32 logits. The rest on request."""
    dtypes = variant.dtypes
    usual = dtypes["gating_output"] != torch.float16 and dtypes["topk_indices"] == torch.int32
    return usual and "bias" not in dtypes and bool(variant.static["renormalize"])


SPEC = OpSpec(
    name=NAME,
    args=(
        TensorArg("topk_weights", ("M", "A"), FLOAT, mutated=True),
        TensorArg("topk_indices", ("M", "A"), (torch.int32, torch.int64), mutated=True),
        TensorArg("token_expert_indices", ("M", "A"), INT, mutated=True),
        TensorArg("gating_output", ("M", "N"), (torch.bfloat16, torch.float16, torch.float32)),
        BoolArg("renormalize"),
        TensorArg("bias", ("N",), FLOAT, optional=True),
        TensorArg("is_padding", ("M",), (torch.bool,), optional=True),
    ),
    reference=reference,
    sample=sample,
    shapes=({"N": 128}, {}),
    calls=experts,
    config_key={"num_experts": "N", "num_tokens": "M"},
    ladder=(16, 256, 8192),
    hints={"N": 128},
    served=served,
    typical="int32-bfloat16+renormalize",
    vllm=VllmOp(NAME, namespace="_moe_C"),
)
