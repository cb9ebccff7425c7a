"""The Helion kernel of scaled_mm_blockwise: as that of scaled_mm, but the sum of each 128 products is scaled by itself."""

from __future__ import annotations

from typing import Any

import helion
import helion.language as hl
import torch
from hdispatch.opspec import Variant

from ..lib import helion_gemm as lib

#: Columns of a per scale; rows and columns of b per scale.
GROUP = 128
#: Of the two matrices, the two scales and out: scales may lie row by row or column by column, which a descriptor would fix.
MATRICES_BY_TMA = ["tensor_descriptor"] * 2 + ["pointer"] * 3


# 64-bit offsets: see dynamic_per_token_scaled_fp8_quant.
@helion.kernel(static_shapes=False, index_dtype=torch.int64)
def scaled_mm_blockwise(
    out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, a_scales: torch.Tensor, b_scales: torch.Tensor
) -> None:
    m, k = a.size()
    k, n = hl.specialize(k), hl.specialize(b.size(1))
    depth = hl.register_block_size(32, GROUP)
    hl.pdl_wait()
    for columns, rows in hl.tile([n, m]):
        acc = hl.zeros([columns, rows], dtype=torch.float32)
        for at in hl.tile(k, block_size=depth):
            sums = hl.dot(b[at, columns].T, a[rows, at].T, out_dtype=torch.float32)
            b_scale = b_scales[at.begin // GROUP, columns.index // GROUP]
            acc = acc + sums * (b_scale[:, None] * a_scales[rows, at.begin // GROUP][None, :])
        out[rows, columns] = acc.to(out.dtype).T


KERNEL = scaled_mm_blockwise


def candidates(sizes: dict[str, int], _variant: Variant) -> list[dict[str, Any]]:
    """Configs worth measuring."""
    return lib.candidates(sizes["M"], GROUP, MATRICES_BY_TMA)
