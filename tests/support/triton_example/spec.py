"""triton_example: result = input[:, 8:] + alpha * other, with everything that a launch record can hold."""

from __future__ import annotations

from typing import Any

import torch
from hdispatch.opspec import FloatArg, OpSpec, TensorArg, Variant


def reference(
    result: torch.Tensor, input: torch.Tensor, other: torch.Tensor, alpha: float, bias: torch.Tensor | None = None
) -> None:
    """The op in torch: float32 [M, K]; input has 8 columns more in front; bias [K] may be absent."""
    total = input[:, 8:] + alpha * other
    result.copy_(total if bias is None else total + bias)


def sample(variant: Variant, sizes: dict[str, int], device: torch.device, generator: torch.Generator) -> list[Any]:
    m, k = sizes["M"], sizes["K"]

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=generator.device).to(device)

    result = torch.full((m, k), float("nan"), device=device)
    return [result, random(m, 8 + k), random(m, k), 0.5, None if "bias" in variant.none else random(k)]


SPEC = OpSpec(
    name="triton_example",
    args=(
        TensorArg("result", ("M", "K"), (torch.float32,), mutated=True),
        TensorArg("input", ("M", "N"), (torch.float32,), layout="rows"),
        TensorArg("other", ("M", "K"), (torch.float32,)),
        FloatArg("alpha"),
        TensorArg("bias", ("K",), (torch.float32,), optional=True),
    ),
    reference=reference,
    sample=sample,
    shapes=({"K": 64, "N": 72}, {"K": 1000, "N": 1008}),
    config_key={"width": "K", "rows": "M"},
    ladder=(1, 16, 256),
)
