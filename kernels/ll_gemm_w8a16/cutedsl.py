"""The CuteDSL kernels of ll_gemm_w8a16: see lib/ll_gemm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cutlass import BFloat16, Float8E4M3FN
from hdispatch.opspec import Variant

from ..lib.ll_gemm.configs import dot
from ..lib.ll_gemm.program import Program
from ..lib.ll_gemm.program import program as gemm

#: One record serves all N.
GENERIC = ("N",)
EARLY_READS = ("w", "w_scale")

#: More 16-byte vectors than this per thread do not fit registers.
_VECTORS = 24


def program(variant: Variant, sizes: Mapping[str, int], config: Mapping[str, Any]) -> Program:  # noqa: ARG001
    """What is compiled for a variant, a K and a config."""
    return gemm(Float8E4M3FN, BFloat16, sizes, config, ("out", "x", "w", "w_scale"), x_element=BFloat16)


def candidates(sizes: Mapping[str, int], _variant: Variant) -> list[dict[str, Any]]:
    """Configs that are worth measuring: all that fit registers, with every thread busy in every turn if K allows."""
    m, k = sizes["M"], sizes["K"]
    found, spare = [], []
    for warps in (4, 8, 2, 16, 6, 7, 12):
        turns, left = divmod(k, 16 * 32 * warps)
        vectors = turns + bool(left)
        fitting = [outputs for outputs in (4, 2, 8, 1) if vectors * (outputs + 2 * m) <= _VECTORS]
        (spare if left else found).extend(dot(warps, outputs, m, trigger) for outputs in fitting for trigger in (0, 2))
    return found or spare
