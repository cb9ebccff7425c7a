"""ll_gemm_fp8: few tokens times a matrix of weights in fp8, with a scale per token and per output, or one for all."""

from __future__ import annotations

from typing import Any

import torch
from hdispatch.opspec import Fallback, OpSpec, TensorArg, Variant

from ..lib.model_sizes import QWEN3_8B, products, rows
from ..lib.reference_fp8 import FP8, FP8_MAX

NAME = "ll_gemm_fp8"


def reference(out: torch.Tensor, x: torch.Tensor, w: torch.Tensor, x_scale: torch.Tensor, w_scale: torch.Tensor) -> None:
    """The op in torch.

    out      bfloat16 [M, N], written: x_scale * (w_scale * (x @ w.T)), summed in float32 and rounded once
    x        float8_e4m3fn [M, K], rows contiguous
    w        float8_e4m3fn [N, K], rows contiguous
    x_scale  float32, M elements of any shape, or one for all rows
    w_scale  float32, N elements of any shape, or one for all outputs

    Rows serve 1 <= M <= 32 and K of a multiple of 16, with rows of x and w that begin at multiples of 16 bytes. With PDL they
    read w and w_scale before the kernel before them has ended, if that is no launch of ours that may still write them.
    """
    sums = x.float() @ w.float().t()
    sums.mul_(w_scale.reshape(1, w_scale.numel())).mul_(x_scale.reshape(x_scale.numel(), 1))
    out.copy_(sums)


def fallback(out: torch.Tensor, x: torch.Tensor, w: torch.Tensor, x_scale: torch.Tensor, w_scale: torch.Tensor) -> None:
    """The op where no row serves: torch._scaled_mm, where it takes the operands."""
    (m, k), n = x.shape, w.size(0)
    dense = w.stride(0) == k and w.data_ptr() % 16 == 0
    if not (x.is_cuda and m and n and k and dense and k % 16 == 0 and n % 16 == 0):
        reference(out, x, w, x_scale, w_scale)
        return
    # What is small is copied: cuBLAS refuses strides of a single row, and addresses, that torch takes for good.
    rows = torch.empty(m, k, dtype=x.dtype, device=x.device).copy_(x)
    by_row = [torch.empty(c, device=x.device, dtype=s.dtype).copy_(s.reshape(-1)) for s, c in ((x_scale, m), (w_scale, n))]
    out.copy_(torch._scaled_mm(rows, w.t(), by_row[0][:, None], by_row[1][None], out_dtype=out.dtype, use_fast_accum=False))


def sample(variant: Variant, sizes: dict[str, int], device: torch.device, generator: torch.Generator) -> list[Any]:
    """Random arguments; `OpSpec` says the rest."""
    m, k, n = sizes["M"], sizes["K"], sizes["N"]

    def normal(rows: int) -> torch.Tensor:
        x = torch.randn(rows, k, generator=generator, device=generator.device).mul_(100.0)
        return x.clamp_(-FP8_MAX, FP8_MAX).to(device=device, dtype=FP8)

    def scales(count: int) -> torch.Tensor:
        return (torch.rand(count, generator=generator, device=generator.device) * 1.5e-3 + 2.5e-4).to(device)

    out = torch.full((m, n), float("nan"), dtype=variant.dtypes["out"], device=device)
    return [out, normal(m), normal(n), scales(m), scales(n)]


SPEC = OpSpec(
    name=NAME,
    args=(
        TensorArg("out", ("M", "N"), (torch.bfloat16,), mutated=True, layout="rows"),
        TensorArg("x", ("M", "K"), (FP8,), layout="rows"),
        TensorArg("w", ("N", "K"), (FP8,), layout="rows"),
        TensorArg("x_scale", ("M",), (torch.float32,), flat=True, broadcast=True),
        TensorArg("w_scale", ("N",), (torch.float32,), flat=True, broadcast=True),
    ),
    reference=reference,
    sample=sample,
    shapes=(*rows(products, models=QWEN3_8B), {}),
    calls=products,
    config_key={"in_features": "K", "out_features": "N", "num_tokens": "M"},
    ladder=(1, 2, 4, 8, 16, 32),
    fallback=Fallback(fallback, beyond_ladder=True),
)
