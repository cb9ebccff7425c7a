"""rms_norm: RMS norm of the last dimension, as the op of vLLM; rows may lie apart, as heads in a row of q, k and v do."""

from __future__ import annotations

from typing import Any

import torch
from hdispatch.opspec import FloatArg, OpSpec, TensorArg, Variant, VllmOp

from ..lib.model_sizes import norms, rows
from ..lib.reference_fp8 import random_rows
from ..lib.reference_norm import normalized, random_weight

NAME = "rms_norm"


def reference(result: torch.Tensor, input: torch.Tensor, weight: torch.Tensor | None, epsilon: float) -> None:
    """The op in torch.

    result    [M, K] or [M, N, K] contiguous, dtype of input, written: input * r * weight, rounded once; may be input
    input     bfloat16 or float16 [M, K] or [M, N, K], last dimension contiguous
    weight    [K], dtype of input, or None for ones
    epsilon   added to the mean of the squares, at least 0

    [M, K] is [M, 1, K], and [batch, length, N, K] is [batch * length, N, K].
    r = rsqrt(mean(input * input) + epsilon) of each row; all arithmetic is float32.
    """
    result.copy_(normalized(input.float(), weight, epsilon).reshape(result.shape))


def sample(variant: Variant, sizes: dict[str, int], device: torch.device, generator: torch.Generator) -> list[Any]:
    """Random arguments; `OpSpec` says the rest."""
    m, n, k, dtype = sizes["M"], sizes["N"], sizes["K"], variant.dtypes["input"]
    x = random_rows(m * n, k, dtype, device, generator).view(m, n, k)
    weight = None if "weight" in variant.none else random_weight(k, dtype, device, generator)
    return [torch.full_like(x, float("nan")), x, weight, 1e-6]


SPEC = OpSpec(
    name=NAME,
    args=(
        TensorArg("result", ("M", "N", "K"), "input", mutated=True, pad=True, merge=True, in_place="input"),
        TensorArg("input", ("M", "N", "K"), (torch.bfloat16, torch.float16), layout="any", pad=True, merge=True),
        TensorArg("weight", ("K",), "input", optional=True),
        FloatArg("epsilon", minimum=0.0),
    ),
    reference=reference,
    sample=sample,
    # Hidden states have one row per token, heads have any number.
    shapes=(*rows(norms, "hidden"), *({"K": k} for k in (128, 64, 256)), {}),
    calls=norms,
    config_key={"hidden_size": "K", "num_tokens": "M"},
    typical="bfloat16+weight",
    # K is below every block, so that configs for few columns can be traced too.
    hints={"K": 48, "N": 8},
    vllm=VllmOp(NAME),
)
