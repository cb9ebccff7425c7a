"""The Helion kernel of fused_add_rms_norm: one row per program, read once."""

from __future__ import annotations

from typing import Any

import helion
import helion.language as hl
import torch
from hdispatch.opspec import Variant

from ..lib import helion_rows
from ..lib.helion_fp8 import release_dependents, widened
from ..lib.helion_norm import inverse_rms, weighted


# 64-bit offsets: see dynamic_per_token_scaled_fp8_quant.
@helion.kernel(static_shapes=False, index_dtype=torch.int64)
def fused_add_rms_norm(input: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, epsilon: float) -> None:
    m, k = input.size()
    k = hl.specialize(k)
    hl.pdl_wait()
    for rows in hl.tile(m):
        total = (widened(input[rows, :]) + widened(residual[rows, :])).to(residual.dtype)
        residual[rows, :] = total
        release_dependents()
        x = total.to(torch.float32)
        y = weighted(x * inverse_rms(x, k, epsilon), weight)
        input[rows, :] = y.to(input.dtype)


KERNEL = fused_add_rms_norm


def candidates(sizes: dict[str, int], _variant: Variant) -> list[dict[str, Any]]:
    """Configs worth measuring."""
    return helion_rows.candidates(sizes["M"], sizes["K"])
