"""The CuteDSL kernels of scaled_mm: see lib/ll_gemm for few tokens, lib/tile_gemm.py for many.

With PDL they read b and b_scales before the kernel before them has ended.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from cutlass import BFloat16, Float8E4M3FN, Float16
from hdispatch.opspec import Variant

from ..lib.ll_gemm.candidates import fp8_candidates
from ..lib.ll_gemm.program import FORMS, Program
from ..lib.ll_gemm.program import program as gemm
from ..lib.tile_candidates import tile_candidates
from ..lib.tile_gemm import TileGemm

#: One record serves all N; K is compiled in where a row has one.
GENERIC = ("N",)
EARLY_READS = ("b", "b_scales")

#: The most tokens that the kernels for few of them take.
_FEW = 192


def program(variant: Variant, sizes: Mapping[str, int], config: Mapping[str, Any]) -> Program:
    """What is compiled for a variant, a K and a config."""
    out = Float16 if variant.dtypes["out"] == torch.float16 else BFloat16
    names = ("out", "a", "b", "a_scales", "b_scales", *(() if "bias" in variant.none else ("bias",)))
    return gemm(Float8E4M3FN, out, sizes, config, names, transposed=True, forms={**FORMS, "tile": TileGemm})


def candidates(sizes: Mapping[str, int], _variant: Variant) -> list[dict[str, Any]]:
    """Configs that are worth measuring."""
    few = fp8_candidates(sizes) if sizes["M"] <= _FEW else []
    return few + tile_candidates(sizes)
