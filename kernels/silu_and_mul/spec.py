"""silu_and_mul: silu(gate) * up, as the op of vLLM."""

from __future__ import annotations

from typing import Any

import torch
from hdispatch.opspec import OpSpec, TensorArg, Variant, VllmOp

from ..lib.model_sizes import activated, rows
from ..lib.reference_fp8 import random_rows

NAME = "silu_and_mul"


def reference(result: torch.Tensor, input: torch.Tensor) -> None:
    """The op in torch.

    result    [M, N], dtype of input, written
    input     bfloat16 or float16 [M, 2 * N]: gate in the first half of a row, up in the second

    Several dimensions may stand for M: [batch, length, 2 * N].

    gate / (1 + exp(-gate)) in float32 is rounded to the dtype of input, multiplied by up and rounded again: vLLM's kernel
    and torch's silu do so too. An up of -0 counts as +0, because vLLM's kernel adds 0 to it.
    """
    gate, up = input.chunk(2, dim=-1)
    y = torch.nn.functional.silu(gate.float()).to(input.dtype).float() * (up.float() + 0.0)
    result.copy_(y.reshape(result.shape))


def sample(variant: Variant, sizes: dict[str, int], device: torch.device, generator: torch.Generator) -> list[Any]:
    """Random arguments; `OpSpec` says the rest."""
    m, n, dtype = sizes["M"], sizes["N"], variant.dtypes["input"]
    result = torch.full((m, n), float("nan"), dtype=dtype, device=device)
    return [result, random_rows(m, 2 * n, dtype, device, generator)]


SPEC = OpSpec(
    name=NAME,
    args=(
        TensorArg("result", ("M", "N"), "input", mutated=True, merge=True),
        TensorArg("input", ("M", "2*N"), (torch.bfloat16, torch.float16), merge=True),
    ),
    reference=reference,
    sample=sample,
    shapes=(*rows(activated), {}),
    calls=activated,
    config_key={"intermediate_size": "N", "num_tokens": "M"},
    vllm=VllmOp(NAME),
)
