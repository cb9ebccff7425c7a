"""The Helion kernel of static_scaled_fp8_quant: a block of columns of some rows per program."""

from __future__ import annotations

from typing import Any

import helion
import helion.language as hl
import torch
from hdispatch.opspec import Variant

from ..lib import helion_rows
from ..lib.helion_fp8 import number_in, release_dependents, widened, within_448
from ..lib.helion_groups import reciprocal


# 64-bit offsets: see dynamic_per_token_scaled_fp8_quant.
@helion.kernel(static_shapes=False, index_dtype=torch.int64)
def static_scaled_fp8_quant(result: torch.Tensor, input: torch.Tensor, scale: torch.Tensor, group_shape: None) -> None:
    m, k = input.size()
    k = hl.specialize(k)
    hl.pdl_wait()
    for rows, columns in hl.tile([m, k]):
        x = widened(input[rows, columns])
        inverse = reciprocal(number_in(scale))
        release_dependents()
        result[rows, columns] = within_448(x * inverse).to(result.dtype)


KERNEL = static_scaled_fp8_quant


def check(_result: torch.Tensor, _input: torch.Tensor, scale: torch.Tensor, _group_shape: None) -> None:
    """ValueError for a scale per block, which the kernel does not take: it becomes a guard of the record."""
    if scale.size(0) != 1:
        raise ValueError(f"static_scaled_fp8_quant: scale has {scale.size(0)} elements; the kernel takes one")


def candidates(sizes: dict[str, int], _variant: Variant) -> list[dict[str, Any]]:
    """Configs worth measuring."""
    return helion_rows.block_candidates(sizes["M"], sizes["K"])
