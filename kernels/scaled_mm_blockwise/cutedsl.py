"""The CuteDSL kernels of scaled_mm_blockwise: see lib/ll_gemm for few tokens, lib/tile_gemm.py for many.

With PDL they read b and b_scales before the kernel before them has ended.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hdispatch.opspec import Variant

from ..lib.block_tile_gemm import BlockTileGemm
from ..lib.ll_gemm.candidates import FEW_ROWS, block_scaled_candidates
from ..lib.ll_gemm.program import Program, scaled_program
from ..lib.tile_candidates import block_tile_candidates

#: One record serves all N; K is compiled in where a row has one.
GENERIC = ("N",)
EARLY_READS = ("b", "b_scales")


def program(variant: Variant, sizes: Mapping[str, int], config: Mapping[str, Any]) -> Program:
    """What is compiled for a variant, a K and a config."""
    return scaled_program(variant, sizes, config, {"block_tile": BlockTileGemm}, grouped=True)


def candidates(sizes: Mapping[str, int], _variant: Variant) -> list[dict[str, Any]]:
    """Configs that are worth measuring."""
    few = block_scaled_candidates(sizes) if sizes["M"] <= FEW_ROWS else []
    return few + block_tile_candidates(sizes)
