"""The Helion kernel of dynamic_per_token_scaled_fp8_quant: one row per program, read once."""

from __future__ import annotations

from typing import Any

import helion
import helion.language as hl
import torch
from hdispatch.opspec import Variant

from ..lib import helion_rows
from ..lib.helion_fp8 import number_in, quantize_rows, release_dependents, scale_rows, widened


# 64-bit offsets: Helion's own check against 2**31 counts elements and does not see a row stride; here they cost 3 registers.
@helion.kernel(static_shapes=False, index_dtype=torch.int64)
def dynamic_per_token_scaled_fp8_quant(
    result: torch.Tensor,
    input: torch.Tensor,
    scale: torch.Tensor,
    scale_ub: torch.Tensor | None = None,
) -> None:
    m, k = input.size()
    k = hl.specialize(k)
    hl.pdl_wait()
    for rows in hl.tile(m):
        x = widened(input[rows, :])
        bound = number_in(scale_ub)
        release_dependents()
        s = scale_rows(x, bound)
        scale[rows, 0] = s
        result[rows, :] = quantize_rows(x, s, bound).to(result.dtype)


KERNEL = dynamic_per_token_scaled_fp8_quant


def candidates(sizes: dict[str, int], _variant: Variant) -> list[dict[str, Any]]:
    """Configs worth measuring."""
    return helion_rows.candidates(sizes["M"], sizes["K"])
