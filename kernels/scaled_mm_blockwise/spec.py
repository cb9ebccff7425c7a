"""scaled_mm_blockwise: a product of fp8 matrices with scales per group of 128, as the blockwise cutlass_scaled_mm of vLLM."""

from __future__ import annotations

from typing import Any

import torch
from hdispatch.opspec import Form, OpSpec, TensorArg, Variant, VllmOp

from ..lib.model_sizes import products, rows
from ..lib.reference_fp8 import FP8
from ..lib.reference_gemm import random_fp8, random_scales

NAME = "scaled_mm_blockwise"

#: Columns of a per scale; rows and columns of b per scale.
GROUP = 128


def reference(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, a_scales: torch.Tensor, b_scales: torch.Tensor) -> None:
    """The op in torch.

    out       bfloat16 or float16 [M, N], written: (a * its scales) @ (b * its scales), rounded once
    a         float8_e4m3fn [M, K], rows contiguous
    b         float8_e4m3fn [K, N], columns contiguous: the transpose of the weights [N, K]
    a_scales  float32 [M, ceil(K / 128)], any strides: one per row and 128 columns of a
    b_scales  float32 [ceil(K / 128), ceil(N / 128)], any strides: one per 128 rows and 128 columns of b

    Each 128 products are summed and then scaled; all arithmetic is float32.
    """
    k, n = b.shape
    total = torch.zeros(out.shape, dtype=torch.float32, device=out.device)
    for block, at in enumerate(range(0, k, GROUP)):
        sums = a[:, at : at + GROUP].float() @ b[at : at + GROUP].float()
        columns = b_scales[block].repeat_interleave(GROUP)[:n]
        total += sums.mul_(a_scales[:, block : block + 1]).mul_(columns)
    out.copy_(total)


def sample(variant: Variant, sizes: dict[str, int], device: torch.device, generator: torch.Generator) -> list[Any]:
    """Random arguments, a_scales column-major as vLLM makes them; `OpSpec` says the rest."""
    m, k, n, dtype = sizes["M"], sizes["K"], sizes["N"], variant.dtypes["out"]
    groups_k, groups_n = -(-k // GROUP), -(-n // GROUP)
    a, b = random_fp8(m, k, device, generator), random_fp8(n, k, device, generator).t()
    a_scales = random_scales((groups_k, m), device, generator).t()
    b_scales = random_scales((groups_n, groups_k), device, generator).t()
    return [torch.full((m, n), float("nan"), dtype=dtype, device=device), a, b, a_scales, b_scales]


SPEC = OpSpec(
    name=NAME,
    args=(
        TensorArg("out", ("M", "N"), (torch.bfloat16, torch.float16), mutated=True, layout="rows"),
        TensorArg("a", ("M", "K"), (FP8,), layout="rows"),
        TensorArg("b", ("K", "N"), (FP8,), layout="columns"),
        TensorArg("a_scales", ("M", "K/128"), (torch.float32,), layout="any"),
        TensorArg("b_scales", ("K/128", "N/128"), (torch.float32,), layout="any"),
    ),
    reference=reference,
    sample=sample,
    shapes=(*rows(products), {}),
    calls=products,
    config_key={"in_features": "K", "out_features": "N", "num_tokens": "M"},
    vllm=VllmOp(
        "cutlass_scaled_mm",
        (Form("out", "rows"), Form("a", "rows"), *(Form(name, "packed") for name in ("b", "a_scales", "b_scales"))),
    ),
)
