"""ll_gemm_w8a16: few tokens in 16 bits times a matrix of weights in fp8, with a scale per output, or one for all."""

from __future__ import annotations

from typing import Any

import torch
from hdispatch.opspec import Fallback, OpSpec, TensorArg, Variant

from ..lib.reference_fp8 import FP8
from ..lib.reference_gemm import random_fp8, random_scales

NAME = "ll_gemm_w8a16"

#: (K, N) of out and down of Qwen3 8B and 1.7B: the products whose inputs are quantized for them alone.
SHAPES = ((4096, 4096), (12288, 4096), (2048, 2048), (6144, 2048))

#: Sums in float32, in another order than the reference's: some units of 2**-24 of the partial sums.
ACCUMULATION = 1e-7


def reference(out: torch.Tensor, x: torch.Tensor, w: torch.Tensor, w_scale: torch.Tensor) -> None:
    """The op in torch.

    out      bfloat16 [M, N], written: w_scale * (x @ w.T), summed in float32 and rounded once
    x        bfloat16 [M, K], rows contiguous
    w        float8_e4m3fn [N, K], rows contiguous
    w_scale  float32, N elements of any shape, or one for all outputs

    Rows serve 1 <= M <= 4 and K of a multiple of 16, with rows of x and w that begin at multiples of 16 bytes. With PDL they
    read w and w_scale before the kernel before them has ended, if that is no launch of ours that may still write them.
    """
    out.copy_((x.float() @ w.float().t()).mul_(w_scale.reshape(1, w_scale.numel())))


def sample(variant: Variant, sizes: dict[str, int], device: torch.device, generator: torch.Generator) -> list[Any]:
    """Random arguments; `OpSpec` says the rest."""
    m, k, n = sizes["M"], sizes["K"], sizes["N"]
    out = torch.full((m, n), float("nan"), dtype=variant.dtypes["out"], device=device)
    x = torch.randn(m, k, generator=generator, device=generator.device).to(device=device, dtype=torch.bfloat16)
    return [out, x, random_fp8(n, k, device, generator), random_scales((n,), device, generator)]


SPEC = OpSpec(
    name=NAME,
    args=(
        TensorArg("out", ("M", "N"), (torch.bfloat16,), mutated=True, layout="rows"),
        TensorArg("x", ("M", "K"), (torch.bfloat16,), layout="rows"),
        TensorArg("w", ("N", "K"), (FP8,), layout="rows"),
        TensorArg("w_scale", ("N",), (torch.float32,), flat=True, broadcast=True),
    ),
    reference=reference,
    sample=sample,
    accumulation=ACCUMULATION,
    shapes=tuple({"K": k, "N": n} for k, n in SHAPES),
    config_key={"in_features": "K", "out_features": "N", "num_tokens": "M"},
    ladder=(1, 2, 4),
    fallback=Fallback(reference, beyond_ladder=True),
)
