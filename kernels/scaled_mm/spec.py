"""scaled_mm: a product of fp8 matrices with a scale per row and per column, and a bias, as cutlass_scaled_mm of vLLM."""

from __future__ import annotations

from typing import Any

import torch
from hdispatch.opspec import OpSpec, TensorArg, Variant, VllmOp

from ..lib.model_sizes import products, rows
from ..lib.reference_fp8 import FP8
from ..lib.reference_gemm import random_fp8, random_scales

NAME = "scaled_mm"


def reference(
    out: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    a_scales: torch.Tensor,
    b_scales: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> None:
    """The op in torch.

    out       bfloat16 or float16 [M, N], written: a_scales * (b_scales * (a @ b)) + bias, rounded once
    a         float8_e4m3fn [M, K], rows contiguous
    b         float8_e4m3fn [K, N], columns contiguous: the transpose of the weights [N, K]
    a_scales  float32, M elements of any shape, or one for all rows
    b_scales  float32, N elements of any shape, or one for all columns
    bias      [N], dtype of out, or None

    Products are exact, all else is float32; the kernels add the products as the tensor core does, to fewer bits.
    """
    sums = a.float() @ b.float()
    sums.mul_(b_scales.reshape(1, b_scales.numel())).mul_(a_scales.reshape(a_scales.numel(), 1))
    out.copy_(sums if bias is None else sums.add_(bias))


#: Hopper's tensor core keeps 13 bits after the binary point of the largest of 32 products and the sum so far, and drops the
#: rest. Simulated for normal numbers: 0.09 % of the output's root mean square at K = 2048, 0.41 % at K = 25600.
ACCUMULATION = 2.6e-5


def sample(variant: Variant, sizes: dict[str, int], device: torch.device, generator: torch.Generator) -> list[Any]:
    """Random arguments; `OpSpec` says the rest."""
    m, k, n, dtype = sizes["M"], sizes["K"], sizes["N"], variant.dtypes["out"]
    a, b = random_fp8(m, k, device, generator), random_fp8(n, k, device, generator).t()
    scales = (random_scales((m,), device, generator), random_scales((n,), device, generator))
    bias = None
    if "bias" not in variant.none:
        bias = torch.randn(n, generator=generator, device=generator.device).to(device=device, dtype=dtype)
    return [torch.full((m, n), float("nan"), dtype=dtype, device=device), a, b, *scales, bias]


#: The powers of two, and what tiles of more than 128 tokens serve in one.
LADDER = tuple(sorted([*(2**i for i in range(14)), 144, 160, 192]))

SPEC = OpSpec(
    name=NAME,
    args=(
        TensorArg("out", ("M", "N"), (torch.bfloat16, torch.float16), mutated=True, layout="rows"),
        TensorArg("a", ("M", "K"), (FP8,), layout="rows"),
        TensorArg("b", ("K", "N"), (FP8,), layout="columns"),
        TensorArg("a_scales", ("M",), (torch.float32,), flat=True, broadcast=True),
        TensorArg("b_scales", ("N",), (torch.float32,), flat=True, broadcast=True),
        TensorArg("bias", ("N",), "out", optional=True),
    ),
    reference=reference,
    sample=sample,
    shapes=(*rows(products), {}),
    calls=products,
    config_key={"in_features": "K", "out_features": "N", "num_tokens": "M"},
    ladder=LADDER,
    accumulation=ACCUMULATION,
    vllm=VllmOp("cutlass_scaled_mm"),
)
