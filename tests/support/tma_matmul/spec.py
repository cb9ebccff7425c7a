"""tma_matmul: result = input @ weight, the weight column-major, as a linear layer keeps it."""

from __future__ import annotations

from typing import Any

import torch
from hdispatch.opspec import OpSpec, TensorArg, Variant
from hdispatch.testing.numeric import poison


def reference(result: torch.Tensor, input: torch.Tensor, weight: torch.Tensor) -> None:
    """The op in torch: bfloat16 [M, K] @ [K, N], summed in float32."""
    result.copy_(input.float() @ weight.float())


def sample(variant: Variant, sizes: dict[str, int], device: torch.device, generator: torch.Generator) -> list[Any]:
    m, k, n = sizes["M"], sizes["K"], sizes["N"]

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=generator.device).to(device, torch.bfloat16)

    return [poison(torch.empty(m, n, dtype=torch.bfloat16, device=device)), random(m, k), random(n, k).t()]


SPEC = OpSpec(
    name="tma_matmul",
    args=(
        TensorArg("result", ("M", "N"), (torch.bfloat16,), mutated=True),
        TensorArg("input", ("M", "K"), "result", layout="rows"),
        TensorArg("weight", ("K", "N"), "result", layout="columns"),
    ),
    reference=reference,
    sample=sample,
    shapes=({"K": 256, "N": 128}, {}),
    config_key={"k": "K", "n": "N", "rows": "M"},
    ladder=(1, 16, 256),
    hints={"K": 512, "N": 384},
)
