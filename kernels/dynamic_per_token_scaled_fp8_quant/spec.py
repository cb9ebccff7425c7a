"""dynamic_per_token_scaled_fp8_quant: each row of the input to fp8 with a scale of its own, as the op of vLLM."""

from __future__ import annotations

from typing import Any

import torch
from hdispatch.opspec import OpSpec, TensorArg, Variant, VllmOp

from ..lib.model_sizes import quantized, rows
from ..lib.reference_fp8 import FP8, poisoned_outputs, quantize_rows, random_rows, upper_bound

NAME = "dynamic_per_token_scaled_fp8_quant"


def reference(result: torch.Tensor, input: torch.Tensor, scale: torch.Tensor, scale_ub: torch.Tensor | None = None) -> None:
    """The op in torch.

    result    float8_e4m3fn [M, K], written: clamp(input / scale, -448, 448)
    input     bfloat16 or float16 [M, K], last dimension contiguous
    scale     float32 [M, 1], written: max(min(max |row|, scale_ub) / 448, 1 / (448 * 512))
    scale_ub  float32 with one element, or None

    All arithmetic is float32; signs of zeros are kept, and subnormal numbers. All as vLLM's kernel has it:
    NaN does not count in max |row|, and its code is 448 (0x7e). An infinity makes the scale infinite; its own code is then
    448, whatever its sign, and those of finite numbers are zeros of their signs. Where scale_ub keeps the scale finite, the
    code of an infinity is 448 or -448.
    """
    quantize_rows(input.float(), result, scale, scale_ub)


def sample(variant: Variant, sizes: dict[str, int], device: torch.device, generator: torch.Generator) -> list[Any]:
    """Random arguments; `OpSpec` says the rest."""
    m, k = sizes["M"], sizes["K"]
    x = random_rows(m, k, variant.dtypes["input"], device, generator)
    result, scale = poisoned_outputs(m, k, device)
    return [result, x, scale, None if "scale_ub" in variant.none else upper_bound(x)]


SPEC = OpSpec(
    name=NAME,
    args=(
        TensorArg("result", ("M", "K"), (FP8,), mutated=True),
        TensorArg("input", ("M", "K"), (torch.bfloat16, torch.float16), layout="rows"),
        TensorArg("scale", ("M", 1), (torch.float32,), mutated=True),
        TensorArg("scale_ub", (1,), (torch.float32,), optional=True),
    ),
    reference=reference,
    sample=sample,
    shapes=(*rows(quantized, "hidden", "intermediate"), {}),
    calls=quantized,
    config_key={"hidden_size": "K", "num_tokens": "M"},
    hints={"K": 48},  # below every block, so that configs for few columns can be traced too
    vllm=VllmOp(NAME),
)
