"""The Helion kernel of silu_and_mul_per_block_quant: some neighbouring groups of a row per program."""

from __future__ import annotations

from typing import Any

import helion
import helion.language as hl
import torch
from hdispatch.opspec import Variant

from ..lib import helion_groups as lib
from ..lib.helion_fp8 import magnitude, number_in, quantize_rows, release_dependents, silu, widened
from ..lib.helion_groups import absmax_scale, bounded_scale, lesser


def scale_of(x: torch.Tensor, bound: torch.Tensor | None) -> torch.Tensor:
    """min(max |group| / 448, bound) of each group; of NaNs alone the bound, or 0 without one."""
    if bound is None:
        return absmax_scale(torch.amax(magnitude(x), dim=-1))
    absmax = torch.amax(magnitude(x, of_nan=-1.0), dim=-1)
    of_nans = torch.where(bound > 0, bound, torch.zeros_like(bound))
    return torch.where(absmax < 0, of_nans, lesser(absmax_scale(absmax), bound))


# 64-bit offsets: see dynamic_per_token_scaled_fp8_quant.
@helion.kernel(static_shapes=False, index_dtype=torch.int64)
def silu_and_mul_per_block_quant(
    out: torch.Tensor, input: torch.Tensor, scales: torch.Tensor, group_size: hl.constexpr, scale_ub: torch.Tensor | None,
    is_scale_transposed: None, scale_ue8m0: hl.constexpr,
) -> None:  # fmt: skip
    m, n = out.size()
    groups = hl.specialize(n) // group_size
    halves = input.view(m, 2, groups, group_size)
    codes = out.view(m, groups, group_size)
    hl.pdl_wait()
    for rows, group in hl.tile([m, groups]):
        gate = widened(halves[rows, 0, group, :])
        up = widened(halves[rows, 1, group, :])
        bound = number_in(scale_ub)
        release_dependents()
        x = silu(gate) * up
        s = bounded_scale(scale_of(x, bound), scale_ue8m0)
        codes[rows, group, :] = quantize_rows(x, s, bound).to(out.dtype)
        scales[rows, group] = s


KERNEL = silu_and_mul_per_block_quant


def candidates(sizes: dict[str, int], variant: Variant) -> list[dict[str, Any]]:
    """Configs worth measuring."""
    group_size = int(variant.static["group_size"])
    return lib.candidates(sizes["M"], sizes["N"] // group_size, group_size)
