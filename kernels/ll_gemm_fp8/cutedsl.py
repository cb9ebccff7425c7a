"""The CuteDSL kernels of ll_gemm_fp8: see lib/ll_gemm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cutlass import BFloat16, Float8E4M3FN
from hdispatch.opspec import Variant

from ..lib.ll_gemm.candidates import fp8_candidates
from ..lib.ll_gemm.program import Program
from ..lib.ll_gemm.program import program as gemm

#: One record serves all N; K is compiled in where a row has one.
GENERIC = ("N",)
EARLY_READS = ("w", "w_scale")


def program(variant: Variant, sizes: Mapping[str, int], config: Mapping[str, Any]) -> Program:  # noqa: ARG001
    """What is compiled for a variant, a K and a config."""
    return gemm(Float8E4M3FN, BFloat16, sizes, config)


def candidates(sizes: Mapping[str, int], _variant: Variant) -> list[dict[str, Any]]:
    """Configs that are worth measuring."""
    return fp8_candidates(sizes)
