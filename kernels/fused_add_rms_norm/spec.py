"""fused_add_rms_norm: input plus residual into residual, and its RMS norm into input, as the op of vLLM."""

from __future__ import annotations

from typing import Any

import torch
from hdispatch.opspec import FloatArg, OpSpec, TensorArg, Variant, VllmOp

from ..lib.model_sizes import hidden, rows
from ..lib.reference_fp8 import random_rows
from ..lib.reference_norm import normalized, random_weight

NAME = "fused_add_rms_norm"


def reference(input: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, epsilon: float) -> None:
    """The op in torch.

    input     bfloat16 or float16 [M, K], last dimension contiguous; read, and written: residual * r * weight, rounded once
    residual  [M, K], dtype of input, last dimension contiguous; read, and written: input + residual, rounded to its dtype
    weight    [K], dtype of input, or None for ones
    epsilon   added to the mean of the squares, at least 0

    Several dimensions may stand for M: [batch, length, K].
    r = rsqrt(mean(residual * residual) + epsilon) of each row of the new, rounded residual; all arithmetic is float32.
    """
    residual.copy_((input.float() + residual.float().reshape(input.shape)).reshape(residual.shape))
    input.copy_(normalized(residual.float().reshape(input.shape), weight, epsilon))


def sample(variant: Variant, sizes: dict[str, int], device: torch.device, generator: torch.Generator) -> list[Any]:
    """Random arguments; `OpSpec` says the rest."""
    m, k, dtype = sizes["M"], sizes["K"], variant.dtypes["input"]
    x, residual = (random_rows(m, k, dtype, device, generator) for _ in range(2))
    return [x, residual, None if "weight" in variant.none else random_weight(k, dtype, device, generator), 1e-6]


SPEC = OpSpec(
    name=NAME,
    args=(
        TensorArg("input", ("M", "K"), (torch.bfloat16, torch.float16), mutated=True, layout="rows", merge=True),
        TensorArg("residual", ("M", "K"), "input", mutated=True, layout="rows", merge=True),
        TensorArg("weight", ("K",), "input", optional=True),
        FloatArg("epsilon", minimum=0.0),
    ),
    reference=reference,
    sample=sample,
    shapes=(*rows(hidden), {}),
    calls=hidden,
    config_key={"hidden_size": "K", "num_tokens": "M"},
    typical="bfloat16+weight",
    hints={"K": 48},  # below every block, so that configs for few columns can be traced too
    vllm=VllmOp(NAME),
)
