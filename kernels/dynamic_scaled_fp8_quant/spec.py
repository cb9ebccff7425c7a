"""dynamic_scaled_fp8_quant: the input to fp8 with one scale for all of it, as the op of vLLM."""

from __future__ import annotations

from typing import Any

import torch
from hdispatch.opspec import OpSpec, TensorArg, Variant, VllmOp

from ..lib.model_sizes import hidden, rows
from ..lib.reference_fp8 import FP8, FP8_MAX, absmax, random_rows, to_fp8

NAME = "dynamic_scaled_fp8_quant"


def reference(result: torch.Tensor, input: torch.Tensor, scale: torch.Tensor) -> None:
    """The op in torch.

    result    float8_e4m3fn [M, K], written: clamp(input * (1 / scale), -448, 448); a NaN becomes 448
    input     bfloat16 or float16 [M, K], last dimension contiguous
    scale     float32 with one element, written: max |input| / 448, 0 of no elements

    All arithmetic is float32, and the reciprocal is rounded before it is multiplied by. The scale has no lower bound: of
    zeros it is 0, and the codes are 448, which that scale turns to 0 again. NaN does not count in max |input|. An infinity
    makes the scale infinite: its own code is 448, those of finite numbers are zeros of their signs.
    """
    x = input.float()
    largest = absmax(x.flatten()) if x.numel() else x.new_zeros(())
    tensor_scale = largest / torch.full_like(largest, FP8_MAX)
    scale.fill_(tensor_scale)
    result.copy_(to_fp8(x * (torch.ones_like(tensor_scale) / tensor_scale)))


def sample(variant: Variant, sizes: dict[str, int], device: torch.device, generator: torch.Generator) -> list[Any]:
    """Random arguments; `OpSpec` says the rest."""
    m, k = sizes["M"], sizes["K"]
    x = random_rows(m, k, variant.dtypes["input"], device, generator)
    result = torch.full((m, k), 0x7F, dtype=torch.uint8, device=device).view(FP8)
    return [result, x, torch.full((1,), float("nan"), device=device)]


SPEC = OpSpec(
    name=NAME,
    args=(
        TensorArg("result", ("M", "K"), (FP8,), mutated=True),
        TensorArg("input", ("M", "K"), (torch.bfloat16, torch.float16), layout="rows"),
        TensorArg("scale", (1,), (torch.float32,), mutated=True, flat=True),
    ),
    reference=reference,
    sample=sample,
    shapes=(*rows(hidden), {}),
    calls=hidden,
    config_key={"hidden_size": "K", "num_tokens": "M"},
    # Larger tensors have no kernel: see triton.py.
    ladder=(1, 2, 4, 8, 16, 32, 64),
    hints={"K": 16},
    vllm=VllmOp(NAME),
)
