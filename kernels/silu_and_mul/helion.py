"""The Helion kernel of silu_and_mul: a block of columns of some rows per program."""

from __future__ import annotations

from typing import Any

import helion
import helion.language as hl
import torch
from hdispatch.opspec import Variant

from ..lib import helion_rows
from ..lib.helion_fp8 import divided_silu, release_dependents, widened


# 64-bit offsets: see dynamic_per_token_scaled_fp8_quant.
@helion.kernel(static_shapes=False, index_dtype=torch.int64)
def silu_and_mul(result: torch.Tensor, input: torch.Tensor) -> None:
    m, n = result.size()
    halves = input.view(m, 2, hl.specialize(n))
    hl.pdl_wait()
    for rows, columns in hl.tile([m, n]):
        gate = halves[rows, 0, columns]
        up = halves[rows, 1, columns]
        release_dependents()
        # 16-bit numbers: a product in float32 that is rounded is the same, and more instructions.
        result[rows, columns] = divided_silu(widened(gate)).to(gate.dtype) * (up + 0.0)


KERNEL = silu_and_mul


def candidates(sizes: dict[str, int], _variant: Variant) -> list[dict[str, Any]]:
    """Configs worth measuring."""
    return helion_rows.block_candidates(sizes["M"], sizes["N"])
