"""The CuteDSL kernels of ll_gemm_bf16: see ll_gemm.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from cutlass import BFloat16, Float32
from hdispatch.opspec import Variant

from ..ll_gemm import Program, dot, split
from ..ll_gemm import program as gemm

#: One record serves all N; K is compiled in where a row has one.
GENERIC = ("N",)


def program(variant: Variant, sizes: Mapping[str, int], config: Mapping[str, Any]) -> Program:
    """What is compiled for a variant, a K and a config."""
    return gemm(BFloat16, Float32 if variant.dtypes["out"] == torch.float32 else BFloat16, sizes, config)


def candidates(sizes: Mapping[str, int], variant: Variant) -> list[dict[str, Any]]:
    """Configs that are worth measuring. A router's weights are few: all are on their way at once."""
    m, k = sizes["M"], sizes.get("K")
    columns = -(-m // 8)
    columns = 1 if columns <= 1 else 2 if columns == 2 else 4
    if k is None:
        return [split(8, 4, 2, 3, columns=columns), split(8, 2, 2, 3, columns=columns), split(8, 1, 2, 3, columns=columns)]
    found = []
    for cluster in (2, 4, 8):
        for warps in (2, 4, 5, 7, 8, 14):
            steps, left = divmod(2 * k, 64 * cluster * warps)
            if not left and 2 <= steps <= 5 or not left and steps in (8, 10):
                found.append(split(warps, cluster, steps if steps <= 5 else steps // 2, 4, columns=columns))
    if m <= 4:
        for warps in (4, 5, 7, 8, 10, 14, 16, 20):
            turns, left = divmod(k, 8 * 32 * warps)
            if not left and turns <= 4:
                found += [dot(warps, outputs=outputs, tokens=m) for outputs in ((1, 2) if m == 1 else (1,))]
    return found or [split(8, 4, 2, 3, columns=columns)]
