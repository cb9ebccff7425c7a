"""silu_and_mul_dynamic_per_token_quant: silu(gate) * up of each row to fp8 with a scale of its own."""

from __future__ import annotations

from typing import Any

import torch
from hdispatch.opspec import OpSpec, TensorArg, Variant

from ..lib.model_sizes import activated, rows
from ..lib.reference_fp8 import FP8, poisoned_outputs, quantize_rows, random_rows, silu_and_mul, upper_bound

NAME = "silu_and_mul_dynamic_per_token_quant"


def reference(result: torch.Tensor, input: torch.Tensor, scale: torch.Tensor, scale_ub: torch.Tensor | None = None) -> None:
    """The op in torch.

    result    float8_e4m3fn [M, N], written: clamp(x / scale, -448, 448)
    input     bfloat16 or float16 [M, 2 * N], last dimension contiguous: gate in the first half of a row, up in the second
    scale     float32 [M, 1], written: max(min(max |x of the row|, scale_ub) / 448, 1 / (448 * 512))
    scale_ub  float32 with one element, or None

    x = gate * (1 / (1 + exp(-gate))) * up in float32, and never rounded to the dtype of input: so does vLLM's
    silu_and_mul_per_block_quant, while silu_and_mul followed by dynamic_per_token_scaled_fp8_quant rounds in between.
    scale_ub bounds max |x|, as in dynamic_per_token_scaled_fp8_quant. Signs of zeros are kept, also of x that underflows.

    NaN does not count in max |x|, and its code is 448 (0x7e); a gate of -inf makes one. An infinite x makes the scale
    infinite; its own code is then 448, whatever its sign, and those of finite x are zeros of their signs. Where scale_ub
    keeps the scale finite, the code of an infinite x is 448 or -448.
    """
    quantize_rows(silu_and_mul(input), result, scale, scale_ub)


def sample(variant: Variant, sizes: dict[str, int], device: torch.device, generator: torch.Generator) -> list[Any]:
    """Random arguments; `OpSpec` says the rest."""
    m, n = sizes["M"], sizes["N"]
    x = random_rows(m, 2 * n, variant.dtypes["input"], device, generator)
    result, scale = poisoned_outputs(m, n, device)
    return [result, x, scale, None if "scale_ub" in variant.none else upper_bound(silu_and_mul(x))]


SPEC = OpSpec(
    name=NAME,
    args=(
        TensorArg("result", ("M", "N"), (FP8,), mutated=True),
        TensorArg("input", ("M", "2*N"), (torch.bfloat16, torch.float16), layout="rows"),
        TensorArg("scale", ("M", 1), (torch.float32,), mutated=True),
        TensorArg("scale_ub", (1,), (torch.float32,), optional=True),
    ),
    reference=reference,
    sample=sample,
    shapes=(*rows(activated), {}),
    calls=activated,
    config_key={"intermediate_size": "N", "num_tokens": "M"},
    hints={"N": 48},  # below every block, so that configs for few columns can be traced too
)
