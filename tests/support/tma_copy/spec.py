"""tma_copy: result = input[:, 8:], every element moved by TMA."""

from __future__ import annotations

from typing import Any

import torch
from hdispatch.opspec import OpSpec, TensorArg, Variant
from hdispatch.testing.numeric import poison


def reference(result: torch.Tensor, input: torch.Tensor) -> None:
    """The op in torch: bfloat16 [M, K]; input [M, N] has 8 columns more in front."""
    result.copy_(input[:, 8:])


def sample(variant: Variant, sizes: dict[str, int], device: torch.device, generator: torch.Generator) -> list[Any]:
    m, k = sizes["M"], sizes["K"]
    result = poison(torch.empty(m, k, dtype=torch.bfloat16, device=device))
    return [result, torch.randn(m, k + 8, generator=generator, device=generator.device).to(device, torch.bfloat16)]


SPEC = OpSpec(
    name="tma_copy",
    args=(
        TensorArg("result", ("M", "K"), (torch.bfloat16,), mutated=True),
        TensorArg("input", ("M", "N"), "result", layout="rows"),
    ),
    reference=reference,
    sample=sample,
    shapes=({"K": 192, "N": 200}, {"K": 1000, "N": 1008}),
    config_key={"width": "K", "rows": "M"},
    ladder=(1, 16, 256),
)
