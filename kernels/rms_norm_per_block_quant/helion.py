"""The Helion kernel of rms_norm_per_block_quant: one row per program, read once, as a tile of its groups."""

from __future__ import annotations

from typing import Any

import helion
import helion.language as hl
import torch
from hdispatch.opspec import Variant

from ..lib import helion_rows
from ..lib.helion_fp8 import magnitude, number_in, release_dependents, widened, within_448
from ..lib.helion_groups import absmax_scale, bounded_scale, lesser, reciprocal


def largest(y: torch.Tensor, bound: torch.Tensor | None) -> torch.Tensor:
    """max |group| of each group, up to `bound` unless that is None."""
    absmax = torch.amax(magnitude(y), dim=-1)
    return absmax if bound is None else lesser(absmax, bound)


# 64-bit offsets: see dynamic_per_token_scaled_fp8_quant. Helion warns of asking whether a tensor is None.
@helion.kernel(static_shapes=False, index_dtype=torch.int64, ignore_warnings=[helion.exc.TensorOperationInWrapper])
def rms_norm_per_block_quant(
    result: torch.Tensor, input: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, epsilon: float,
    scale_ub: torch.Tensor | None, residual: torch.Tensor | None, group_size: hl.constexpr, is_scale_transposed: None,
    scale_ue8m0: hl.constexpr,
) -> None:  # fmt: skip
    m, k = input.size()
    groups = hl.specialize(k) // group_size
    x_groups = input.as_strided((m, groups, group_size), (input.stride(0), group_size, 1))
    codes = result.view(m, groups, group_size)
    # A row of weights per row: loaded as such, they get the input's layout in registers, and no exchange is needed.
    weights = weight.as_strided((m, groups, group_size), (0, group_size, 1))
    if residual is not None:
        added = residual.view(m, groups, group_size)
    hl.pdl_wait()
    for rows in hl.tile(m):
        x = widened(x_groups[rows, :, :])
        if residual is not None:
            x = x + widened(added[rows, :, :])
            added[rows, :, :] = x.to(residual.dtype)
        w = weights[rows, :, :]
        bound = number_in(scale_ub)
        release_dependents()
        rstd = torch.rsqrt(torch.sum(torch.sum(x * x, dim=-1), dim=-1) * (1.0 / k) + epsilon)
        y = ((x * rstd[:, None, None]).to(input.dtype) * w).to(torch.float32)
        s = bounded_scale(absmax_scale(largest(y, bound)), scale_ue8m0)
        scale[rows, :] = s
        # A product, not a division, as in vLLM: it is rounded twice.
        codes[rows, :, :] = within_448(y * reciprocal(s).unsqueeze(-1)).to(result.dtype)


KERNEL = rms_norm_per_block_quant


def candidates(sizes: dict[str, int], _variant: Variant) -> list[dict[str, Any]]:
    """Configs worth measuring."""
    # Groups and their elements are short: no loops over them to choose.
    configs = helion_rows.candidates(sizes["M"], sizes["K"])
    return [{name: value for name, value in config.items() if name != "reduction_loops"} for config in configs]
