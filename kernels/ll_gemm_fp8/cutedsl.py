"""The CuteDSL kernels of ll_gemm_fp8: see ll_gemm.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cutlass import BFloat16, Float8E4M3FN
from hdispatch.opspec import Variant

from ..ll_gemm import Program, dot, split
from ..ll_gemm import program as gemm

#: One record serves all N; K is compiled in where a row has one.
GENERIC = ("N",)


def program(variant: Variant, sizes: Mapping[str, int], config: Mapping[str, Any]) -> Program:
    """What is compiled for a variant, a K and a config."""
    return gemm(Float8E4M3FN, BFloat16, sizes, config)
