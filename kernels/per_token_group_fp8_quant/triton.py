"""The Triton kernel of per_token_group_fp8_quant: some neighbouring groups per program; see lib/triton_groups.py."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from hdispatch.opspec import Variant

from ..lib import triton_groups as lib
from ..lib.triton_fp8 import reciprocal, widened
from ..lib.triton_groups import clamped_codes, eps_scale, store_codes, store_scales

GENERIC = ("K",)


@triton.jit
def per_token_group_fp8_quant(
    input, output_q, output_s, eps, fp8_min, fp8_max, groups, groups_of_row, row_stride, group_stride,
    GROUP: tl.constexpr, GROUPS: tl.constexpr, VECTOR: tl.constexpr, UE8M0: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """GROUPS groups of GROUP elements per program."""
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    inside = (group < groups)[:, None]
    offset = group.to(tl.int64)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inverse = reciprocal(fp8_max)
    if PDL:
        tl.extra.cuda.gdc_wait()
    x = widened(tl.load(input + offset, inside, other=0.0))
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    scale = eps_scale(x, eps, fp8_max, inverse, UE8M0)
    quotient = clamped_codes(x, scale, fp8_min, fp8_max, UE8M0)
    store_codes(output_q, offset, quotient, inside, VECTOR)
    # Last: the scales change hands between threads, which waits for all of them.
    store_scales(output_s, scale, group, groups, groups_of_row, row_stride, group_stride)


def launch(
    input, output_q, output_s, group_size, eps, fp8_min, fp8_max, scale_ue8m0, _dummy_is_scale_transposed,
    _dummy_is_tma_aligned, *, config, _launcher,
):  # fmt: skip
    """One program for every `elements` elements."""
    sizes = (input.size(0), input.size(1), group_size)
    tensors = (input, output_q, output_s, eps, fp8_min, fp8_max)
    lib.launch_groups(per_token_group_fp8_quant, sizes, tensors, output_s, config, _launcher, UE8M0=scale_ue8m0)


def candidates(sizes: dict[str, int], _variant: Variant) -> list[dict[str, Any]]:
    """Configs worth measuring for some sizes; the first is a safe default."""
    return lib.tile_configs(lib.TILES, sizes, sizes.get("K", 4096))
