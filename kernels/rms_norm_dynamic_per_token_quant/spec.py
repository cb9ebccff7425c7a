"""rms_norm_dynamic_per_token_quant: RMS norm, after adding a residual if given, then rows to fp8, as the op of vLLM."""

from __future__ import annotations

from typing import Any

import torch
from hdispatch.opspec import FloatArg, OpSpec, TensorArg, Variant, VllmOp

from ..lib.model_sizes import hidden, rows
from ..lib.reference_fp8 import FP8, poisoned_outputs, quantize_rows, random_rows, upper_bound
from ..lib.reference_norm import random_weight, summed, twice_rounded

NAME = "rms_norm_dynamic_per_token_quant"


def reference(
    result: torch.Tensor,
    input: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    epsilon: float,
    scale_ub: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
) -> None:
    """The op in torch.

    result    float8_e4m3fn [M, K], written: clamp(y / scale, -448, 448)
    input     bfloat16 or float16 [M, K], last dimension contiguous
    weight    [K], dtype of input
    scale     float32 [M, 1], written: max(min(max |y of the row|, scale_ub) / 448, 1 / (448 * 512))
    epsilon   added to the mean of the squares, at least 0
    scale_ub  float32 with one element, or None
    residual  [M, K] contiguous, dtype of input, or None; read, and x is written to it

    x = input + residual in float32, not rounded, though residual receives it rounded to its dtype. With
    r = rsqrt(mean(x * x) + epsilon) of the row, y = (x * r rounded to the dtype of input) * weight, rounded to it again.

    NaN in x, which makes all of y NaN, has the least scale and codes of 448 (0x7e) as vLLM's kernel has: NaN does not
    count in max |y|. An infinite x, whose r is 0, is NaN in y, and the finite ones of its row are zeros of their signs. An
    infinite y, of a finite x, makes the scale infinite; its own code is then 448, whatever its sign, and those of finite y
    are zeros of their signs. Where scale_ub keeps the scale finite, the code of an infinite y is 448 or -448.
    """
    x = summed(input, residual)
    if residual is not None:
        residual.copy_(x)
    quantize_rows(twice_rounded(x, weight, epsilon), result, scale, scale_ub)


def sample(variant: Variant, sizes: dict[str, int], device: torch.device, generator: torch.Generator) -> list[Any]:
    """Random arguments; `OpSpec` says the rest."""
    m, k, dtype, epsilon = sizes["M"], sizes["K"], variant.dtypes["input"], 1e-6
    x = random_rows(m, k, dtype, device, generator)
    weight = random_weight(k, dtype, device, generator)
    residual = None if "residual" in variant.none else random_rows(m, k, dtype, device, generator)
    scale_ub = None if "scale_ub" in variant.none else upper_bound(twice_rounded(summed(x, residual), weight, epsilon))
    result, scale = poisoned_outputs(m, k, device)
    return [result, x, weight, scale, epsilon, scale_ub, residual]


SPEC = OpSpec(
    name=NAME,
    args=(
        TensorArg("result", ("M", "K"), (FP8,), mutated=True),
        TensorArg("input", ("M", "K"), (torch.bfloat16, torch.float16), layout="rows"),
        TensorArg("weight", ("K",), "input"),
        TensorArg("scale", ("M", 1), (torch.float32,), mutated=True),
        FloatArg("epsilon", minimum=0.0),
        TensorArg("scale_ub", (1,), (torch.float32,), optional=True),
        TensorArg("residual", ("M", "K"), "input", mutated=True, optional=True),
    ),
    reference=reference,
    sample=sample,
    shapes=(*rows(hidden), {}),
    calls=hidden,
    config_key={"hidden_size": "K", "num_tokens": "M"},
    hints={"K": 48},  # below every block, so that configs for few columns can be traced too
    vllm=VllmOp(NAME),
)
