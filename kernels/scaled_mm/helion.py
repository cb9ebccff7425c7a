"""The Helion kernel of scaled_mm: a tile of out per program; weights are the 64-row side of the tensor core."""

from __future__ import annotations

from typing import Any

import helion
import helion.language as hl
import torch
from hdispatch.opspec import Variant

from ..lib import helion_gemm as lib


# 64-bit offsets: see dynamic_per_token_scaled_fp8_quant.
@helion.kernel(static_shapes=False, index_dtype=torch.int64)
def scaled_mm(
    out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, a_scales: torch.Tensor, b_scales: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> None:  # fmt: skip
    m, k = a.size()
    k, n = hl.specialize(k), hl.specialize(b.size(1))
    hl.pdl_wait()
    for columns, rows in hl.tile([n, m]):
        acc = hl.zeros([columns, rows], dtype=torch.float32)
        for at in hl.tile(k):
            acc = hl.dot(b[at, columns].T, a[rows, at].T, acc=acc)
        result = a_scales[rows][None, :] * (b_scales[columns][:, None] * acc)
        if bias is not None:
            result = result + bias[columns].to(torch.float32)[:, None]
        out[rows, columns] = result.to(out.dtype).T


KERNEL = scaled_mm


def candidates(sizes: dict[str, int], _variant: Variant) -> list[dict[str, Any]]:
    """Configs worth measuring."""
    return lib.candidates(sizes["M"])
