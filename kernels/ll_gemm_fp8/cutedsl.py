"""The CuteDSL kernels of ll_gemm_fp8: see ll_gemm.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cutlass import BFloat16, Float8E4M3FN
from hdispatch.opspec import Variant

from ..ll_gemm import Program, columns_for, dot, split, stream
from ..ll_gemm import program as gemm

#: One record serves all N; K is compiled in where a row has one.
GENERIC = ("N",)
EARLY_READS = ("w", "w_scale")

#: More 16-byte vectors than this per thread do not fit registers.
_VECTORS = 24


def program(variant: Variant, sizes: Mapping[str, int], config: Mapping[str, Any]) -> Program:  # noqa: ARG001
    """What is compiled for a variant, a K and a config."""
    return gemm(Float8E4M3FN, BFloat16, sizes, config)


def candidates(sizes: Mapping[str, int], variant: Variant) -> list[dict[str, Any]]:  # noqa: ARG001
    """Configs that are worth measuring: weights of many times what the GPU's blocks hold, or of about as much."""
    m, k, columns = sizes["M"], sizes["K"], columns_for(sizes["M"])
    # Rows of weights share what is read of the tokens, which is as much again for 16 tokens and 16 rows.
    found = [split(4, 1, 2, rows=rows, columns=columns, depth=2) for rows in (2, 4)]
    if columns < 4:
        found += [split(8, 1, 2, rows=2, columns=columns, depth=2), split(8, 2, 1, rows=4, columns=columns, depth=3)]
        for warps, cluster, rows in ((16, 1, 2), (8, 1, 2), (8, 2, 2), (4, 2, 2), (16, 2, 2), (8, 4, 2), (16, 1, 1), (8, 1, 1)):
            steps, left = divmod(k, 64 * cluster * warps)
            if not left and steps >= 2 and rows * steps <= 16:
                found.append(split(warps, cluster, steps, rows=rows, columns=columns))
    for cluster in (1, 2):
        if columns == 1 or k <= 4096 * cluster:
            found += [
                stream(8, 2, 3, columns=columns, cluster=cluster),
                stream(8, 2, 2, rows=2, columns=columns, cluster=cluster, trigger=2),
                stream(8, 4, 3, columns=columns, cluster=cluster, trigger=2),
            ]
    if m <= 2:
        for warps in (8, 4):
            turns, left = divmod(k, 16 * 32 * warps)
            if not left:
                found += [
                    dot(warps, outputs, m, trigger) for outputs in (4, 2) for trigger in (0, 2) if turns * outputs <= _VECTORS
                ]
    return found
