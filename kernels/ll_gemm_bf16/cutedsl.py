"""The CuteDSL kernels of ll_gemm_bf16: see lib/ll_gemm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from cutlass import BFloat16, Float32
from hdispatch.opspec import Variant

from ..lib.ll_gemm.candidates import STREAMED, streaming_candidates
from ..lib.ll_gemm.configs import columns_for, dot, split, warpgroup
from ..lib.ll_gemm.program import Program
from ..lib.ll_gemm.program import program as gemm

#: One record serves all N; K is compiled in where a row has one.
GENERIC = ("N",)
EARLY_READS = ("w",)

#: More 16-byte vectors than this per thread do not fit registers.
_VECTORS = 20


def program(variant: Variant, sizes: Mapping[str, int], config: Mapping[str, Any]) -> Program:
    """What is compiled for a variant, a K and a config."""
    return gemm(BFloat16, Float32 if variant.dtypes["out"] == torch.float32 else BFloat16, sizes, config)


def candidates(sizes: Mapping[str, int], _variant: Variant) -> list[dict[str, Any]]:
    """Configs that are worth measuring. A router's weights are few: all of them are on their way at once. lm_head's stream."""
    m, k, columns = sizes["M"], sizes["K"], columns_for(sizes["M"])
    if 2 * k * sizes.get("N", 0) > STREAMED:
        return streaming_candidates(2 * k, columns)
    found = [split(8, cluster, 2, columns=columns, depth=3) for cluster in (4, 2, 1)]
    for cluster in (4, 8, 2):
        for warps in (2, 4, 5, 7, 8, 10, 14):
            steps, left = divmod(2 * k, 64 * cluster * warps)
            if not left and 2 <= steps <= 8:
                found += [split(warps, cluster, steps, columns=columns, trigger=trigger) for trigger in (0, 1)]
    for rows, cluster in ((8, 4), (16, 4), (16, 2), (16, 1)):
        stages = min(200 // ((rows + 8 * columns) // 4), -(-k // (128 * cluster)))
        found.append(warpgroup(rows, columns, 2, stages, cluster))
    if m <= 4:
        for warps in (4, 5, 7, 8, 10, 14, 16, 20):
            turns, left = divmod(k, 8 * 32 * warps)
            if not left:
                several = (1, 2) if m == 1 else (1,)
                fitting = [outputs for outputs in several if turns * (outputs + m) <= _VECTORS]
                found += [dot(warps, outputs, m, trigger) for outputs in fitting for trigger in (0, 1, 2)]
    return found
