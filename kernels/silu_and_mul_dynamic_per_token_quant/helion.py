"""The Helion kernel of silu_and_mul_dynamic_per_token_quant: one row per program, read once."""

from __future__ import annotations

from typing import Any

import helion
import helion.language as hl
import torch
from hdispatch.opspec import Variant

from ..lib import helion_rows
from ..lib.helion_fp8 import bounded, clamp_rows, divide_rows, magnitude, release_dependents, row_scale, silu


# 64-bit offsets: see dynamic_per_token_scaled_fp8_quant.
@helion.kernel(static_shapes=False, index_dtype=torch.int64)
def silu_and_mul_dynamic_per_token_quant(
    result: torch.Tensor, input: torch.Tensor, scale: torch.Tensor, scale_ub: torch.Tensor | None = None,
) -> None:  # fmt: skip
    m, n = result.size()
    n = hl.specialize(n)
    hl.pdl_wait()
    for rows in hl.tile(m):
        # Not widened(): ptxas then widens all of a long row first, in 128 registers instead of 64.
        gate = input[rows, 0:n].to(torch.float32)
        up = input[rows, n : 2 * n].to(torch.float32)
        if scale_ub is not None:
            bound = hl.load(scale_ub, [0])
        release_dependents()
        x = silu(gate) * up
        absmax = torch.amax(magnitude(x), dim=-1)
        if scale_ub is not None:
            absmax = bounded(absmax, bound)
        s = row_scale(absmax)
        scale[rows, 0] = s
        if scale_ub is not None:
            x = clamp_rows(x, s)
        result[rows, :] = divide_rows(x, s).to(result.dtype)


KERNEL = silu_and_mul_dynamic_per_token_quant


def candidates(sizes: dict[str, int], _variant: Variant) -> list[dict[str, Any]]:
    """Configs worth measuring."""
    return helion_rows.candidates(sizes["M"], sizes["N"])
