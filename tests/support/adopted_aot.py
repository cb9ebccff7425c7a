"""A Helion kernel whose configuration heuristics choose, by a file beside this one."""

from __future__ import annotations

import helion
import helion.language as hl
import torch


@helion.aot_kernel()
def tuned(x: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    for tile in hl.tile(x.size()):
        out[tile] = x[tile] * 2
    return out
