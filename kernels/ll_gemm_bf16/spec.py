"""ll_gemm_bf16: few tokens times a matrix of weights in bfloat16, as a router, small projections and lm_head are."""

from __future__ import annotations

from typing import Any

import torch
from hdispatch.opspec import Fallback, OpSpec, TensorArg, Variant

from ..lib.model_sizes import QWEN3_8B, few_rows, lm_head, rows

NAME = "ll_gemm_bf16"

#: (K, N), hidden size and experts, of the routers of DeepSeek-V3, Qwen3-235B-A22B, OLMoE and DeepSeek-V2.
SHAPES = ((7168, 256), (4096, 128), (2048, 64), (5120, 160))

#: Sums in float32, in another order than the reference's: some units of 2**-24 of the partial sums.
ACCUMULATION = 1e-7


def reference(out: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> None:
    """The op in torch.

    out  bfloat16 or float32 [M, N], written: x @ w.T, summed in float32 and rounded once
    x    bfloat16 [M, K], rows contiguous
    w    bfloat16 [N, K], rows contiguous

    Rows serve 1 <= M <= 32 and K of a multiple of 8, with rows of x and w that begin at multiples of 16 bytes. With PDL they
    read w before the kernel before them has ended, if that is no launch of ours that may still write it.
    """
    out.copy_(x.float() @ w.float().t())


def fallback(out: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> None:
    """The op where no row serves: torch.mm, where it can round to the type of `out` itself."""
    if out.dtype == x.dtype:
        torch.mm(x, w.t(), out=out)
    else:
        reference(out, x, w)


def sample(variant: Variant, sizes: dict[str, int], device: torch.device, generator: torch.Generator) -> list[Any]:
    """Random arguments; `OpSpec` says the rest."""
    m, k, n = sizes["M"], sizes["K"], sizes["N"]

    def normal(rows: int) -> torch.Tensor:
        return torch.randn(rows, k, generator=generator, device=generator.device).to(device=device, dtype=torch.bfloat16)

    out = torch.full((m, n), float("nan"), dtype=variant.dtypes["out"], device=device)
    return [out, normal(m), normal(n).mul_(k**-0.5)]


SPEC = OpSpec(
    name=NAME,
    args=(
        TensorArg("out", ("M", "N"), (torch.bfloat16, torch.float32), mutated=True, layout="rows"),
        TensorArg("x", ("M", "K"), (torch.bfloat16,), layout="rows"),
        TensorArg("w", ("N", "K"), (torch.bfloat16,), layout="rows"),
    ),
    reference=reference,
    sample=sample,
    accumulation=ACCUMULATION,
    shapes=(*({"K": k, "N": n} for k, n in SHAPES), *rows(lm_head, models=QWEN3_8B), {}),
    calls=few_rows,
    config_key={"in_features": "K", "out_features": "N", "num_tokens": "M"},
    ladder=(1, 2, 4, 8, 16, 32),
    fallback=Fallback(fallback, beyond_ladder=True),
)
