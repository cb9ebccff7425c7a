"""The Helion kernel of rms_norm: some (token, head) rows per program, read once."""

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
def rms_norm(result: torch.Tensor, input: torch.Tensor, weight: torch.Tensor | None, epsilon: float) -> None:
    m, n, k = input.size()
    k = hl.specialize(k)
    hl.pdl_wait()
    for rows, heads in hl.tile([m, n]):
        x = widened(input[rows, heads, :])
        release_dependents()
        y = weighted(x * inverse_rms(x, k, epsilon), weight)
        result[rows, heads, :] = y.to(result.dtype)


KERNEL = rms_norm


def candidates(sizes: dict[str, int], _variant: Variant) -> list[dict[str, Any]]:
    """Configs worth measuring."""
    return helion_rows.head_candidates(sizes["M"], sizes["N"], sizes["K"])
