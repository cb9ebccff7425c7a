"""The Helion kernel of per_token_group_fp8_quant: some neighbouring groups of a row per program."""

from __future__ import annotations

from typing import Any

import helion
import helion.language as hl
import torch
from hdispatch.opspec import Variant

from ..lib import helion_groups as lib
from ..lib.helion_fp8 import release_dependents, widened
from ..lib.helion_groups import clamped_codes, eps_scale


# 64-bit offsets: see dynamic_per_token_scaled_fp8_quant.
@helion.kernel(static_shapes=False, index_dtype=torch.int64)
def per_token_group_fp8_quant(
    input: torch.Tensor, output_q: torch.Tensor, output_s: torch.Tensor, group_size: hl.constexpr, eps: float, fp8_min: float,
    fp8_max: float, scale_ue8m0: hl.constexpr, dummy_is_scale_transposed: None, dummy_is_tma_aligned: None,
) -> None:  # fmt: skip
    m, k = input.size()
    groups = hl.specialize(k) // group_size
    x_groups = input.view(m, groups, group_size)
    q_groups = output_q.view(m, groups, group_size)
    hl.pdl_wait()
    for rows, group in hl.tile([m, groups]):
        x = widened(x_groups[rows, group, :])
        release_dependents()
        scale = eps_scale(x, eps, fp8_max, scale_ue8m0)
        q_groups[rows, group, :] = clamped_codes(x, scale, fp8_min, fp8_max).to(output_q.dtype)
        output_s[rows, group] = scale


KERNEL = per_token_group_fp8_quant


def candidates(sizes: dict[str, int], variant: Variant) -> list[dict[str, Any]]:
    """Configs worth measuring."""
    group_size = int(variant.static["group_size"])
    return lib.candidates(sizes["M"], sizes["K"] // group_size, group_size)
