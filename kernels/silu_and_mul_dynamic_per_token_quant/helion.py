"""The Helion kernel of silu_and_mul_dynamic_per_token_quant: one row per program, read once."""

from __future__ import annotations

from typing import Any

import helion
import helion.language as hl
import torch
from hdispatch.opspec import Variant

from ..lib import helion_rows
from ..lib.helion_fp8 import number_in, quantize_rows, release_dependents, scale_rows, silu


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
        bound = number_in(scale_ub)
        release_dependents()
        x = silu(gate) * up
        s = scale_rows(x, bound)
        scale[rows, 0] = s
        result[rows, :] = quantize_rows(x, s, bound).to(result.dtype)


KERNEL = silu_and_mul_dynamic_per_token_quant


def candidates(sizes: dict[str, int], _variant: Variant) -> list[dict[str, Any]]:
    """Configs worth measuring."""
    return helion_rows.candidates(sizes["M"], sizes["N"])
