"""The Helion kernel of dynamic_scaled_fp8_quant, for small tensors: every program reads all of it, and writes its tile.

See triton.py.
"""

from __future__ import annotations

from typing import Any

import helion
import helion.language as hl
import torch
from hdispatch.opspec import Variant

from ..lib.helion_fp8 import magnitude, release_dependents, widened, within_448
from ..lib.helion_groups import absmax_scale, reciprocal

GENERIC = ("K",)

#: Elements beyond which three launches are faster, as for the Triton kernel.
LIMIT = 64 * 5120


# 64-bit offsets: see dynamic_per_token_scaled_fp8_quant.
@helion.kernel(static_shapes=False, index_dtype=torch.int64)
def dynamic_scaled_fp8_quant(result: torch.Tensor, input: torch.Tensor, scale: torch.Tensor) -> None:
    m, k = input.size()
    hl.pdl_wait()
    for rows, columns in hl.tile([m, k]):
        largest = hl.zeros([1], dtype=torch.float32)
        for top in hl.tile(m):
            for left in hl.tile(k):
                absmax = torch.amax(magnitude(widened(input[top, left])), dim=-1)
                largest = torch.maximum(largest, torch.amax(absmax, dim=-1, keepdim=True))
        release_dependents()
        # No lower bound, as in vLLM: of zeros the scale is 0, its reciprocal infinite, and 0 times that NaN.
        s = absmax_scale(largest)
        if rows.begin + columns.begin == 0:
            scale[0] = torch.sum(s)
        result[rows, columns] = within_448(widened(input[rows, columns]) * reciprocal(s)[:, None]).to(result.dtype)


KERNEL = dynamic_scaled_fp8_quant


def check(_result: torch.Tensor, input: torch.Tensor, _scale: torch.Tensor) -> None:
    """ValueError for larger tensors: it becomes a guard of the record."""
    # Without the 8 the open bucket would not reach as far as a bucket must, not even for K = 16.
    if input.size(0) * (input.size(1) - 8) > LIMIT:
        raise ValueError(f"dynamic_scaled_fp8_quant: input has {input.numel()} elements; the kernel is for up to {LIMIT}")


def candidates(sizes: dict[str, int], _variant: Variant) -> list[dict[str, Any]]:
    """Configs worth measuring."""
    rows = min(sizes["M"], 8)
    tiles = [(r, c, t, w) for r in (1, rows) for c in (4096, 1024) for t, w in ((1, 16), (2, 16), (4, 16), (8, 32))]
    common = {"num_stages": 2, "indexing": "pointer", "pid_type": "flat"}
    kept = [(r, c, t, w) for r, c, t, w in dict.fromkeys(tiles) if t <= sizes["M"]]
    return [{"block_sizes": [r, c, t, 4096], "num_warps": w, **common} for r, c, t, w in kept]
