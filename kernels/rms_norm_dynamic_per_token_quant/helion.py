"""The Helion kernel of rms_norm_dynamic_per_token_quant: one row per program, read once."""

from __future__ import annotations

from typing import Any

import helion
import helion.language as hl
import torch
from hdispatch.opspec import Variant

from ..lib import helion_rows
from ..lib.helion_fp8 import number_in, quantize_rows, release_dependents, scale_rows, widened


# 64-bit offsets: see dynamic_per_token_scaled_fp8_quant.
@helion.kernel(static_shapes=False, index_dtype=torch.int64)
def rms_norm_dynamic_per_token_quant(
    result: torch.Tensor, input: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, epsilon: float,
    scale_ub: torch.Tensor | None = None, residual: torch.Tensor | None = None,
) -> None:  # fmt: skip
    m, k = input.size()
    k = hl.specialize(k)
    # A row of weights per row: loaded as a matrix, they get the input's layout in registers, and no exchange is needed.
    weights = weight.as_strided((m, k), (0, 1))
    hl.pdl_wait()
    for rows in hl.tile(m):
        x = widened(input[rows, :])
        if residual is not None:
            x = x + widened(residual[rows, :])
        w = weights[rows, :]
        bound = number_in(scale_ub)
        release_dependents()
        rstd = torch.rsqrt(torch.sum(x * x, dim=-1) * (1.0 / k) + epsilon)
        y = ((x * rstd[:, None]).to(input.dtype) * w).to(torch.float32)
        s = scale_rows(y, bound)
        scale[rows, 0] = s
        result[rows, :] = quantize_rows(y, s, bound).to(result.dtype)
        # Last, because a config with reduction_loops reads residual again in each of its passes.
        if residual is not None:
            residual[rows, :] = x.to(residual.dtype)


KERNEL = rms_norm_dynamic_per_token_quant


def candidates(sizes: dict[str, int], _variant: Variant) -> list[dict[str, Any]]:
    """Configs worth measuring."""
    return helion_rows.candidates(sizes["M"], sizes["K"])
