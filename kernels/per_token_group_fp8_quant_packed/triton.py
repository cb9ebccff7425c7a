"""The Triton kernel of per_token_group_fp8_quant_packed: some neighbouring groups per program.

Groups are numbered through all rows, with each row filled up to a multiple of four: a missing group is a byte of 0. So are
the rows that fill M up to a multiple of four, where the scales lie as vLLM's op takes them.
See lib/triton_groups.py.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from hdispatch.opspec import Variant

from ..lib import triton_groups as lib
from ..lib.triton_fp8 import reciprocal
from ..lib.triton_groups import clamped_codes, eps_scale, row_of, store_codes

GENERIC = ("K",)


@triton.jit
def per_token_group_fp8_quant_packed(
    input, output_q, output_s_packed, eps, fp8_min, fp8_max, m, groups_of_row, words_of_row, row_stride, word_stride,
    GROUP: tl.constexpr, GROUPS: tl.constexpr, VECTOR: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """GROUPS groups of GROUP elements per program, for m rows and those that fill them up to a multiple of four."""
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    row = row_of(group, words_of_row * 4)
    group_in_row = group - row * (words_of_row * 4)
    here = (row < m) & (group_in_row < groups_of_row)
    inside = here[:, None]
    offset = (row.to(tl.int64) * groups_of_row + group_in_row)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    step = tl.where(m == 1, 1, row_stride)  # the stride of one row means nothing
    place = row.to(tl.int64) * step + (group_in_row // 4).to(tl.int64) * word_stride
    inverse = reciprocal(fp8_max)
    if PDL:
        tl.extra.cuda.gdc_wait()
    # Not widened(): the largest tiles would take 56 registers instead of 40.
    x = tl.load(input + offset, inside, other=0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    scale = eps_scale(x, eps, fp8_max, inverse, True)
    quotient = clamped_codes(x, scale, fp8_min, fp8_max, True)
    store_codes(output_q, offset, quotient, inside, VECTOR)
    exponent = tl.where(here, scale.to(tl.int32, bitcast=True) >> 23, 0).to(tl.uint8)
    byte = output_s_packed.to(tl.pointer_type(tl.uint8), bitcast=True) + place * 4 + group_in_row % 4
    # The words behind a column; behind the last one they are nobody's.
    rows = (m + 3) // 4 * 4
    padding = (step == 1) & (word_stride == rows) & (row < rows) & (group_in_row // 4 < words_of_row - 1)
    tl.store(byte, exponent, (row < m) | padding)


def launch(input, output_q, output_s_packed, group_size, eps, fp8_min, fp8_max, *, config, _launcher):
    """One program for every `elements` elements."""
    m, groups_of_row = input.size(0), lib.whole_groups(input.size(1), group_size)
    words_of_row = (groups_of_row + 3) // 4
    groups = (m + 3) // 4 * 4 * words_of_row * 4
    options = lib.tile_options(config, group_size)
    grid = ((groups + options["GROUPS"] - 1) // options["GROUPS"],)
    sizes = (m, groups_of_row, words_of_row, output_s_packed.stride(0), output_s_packed.stride(1))
    tensors = (input, output_q, output_s_packed)
    _launcher(per_token_group_fp8_quant_packed, grid, *tensors, eps, fp8_min, fp8_max, *sizes, **options)


def candidates(sizes: dict[str, int], _variant: Variant) -> list[dict[str, Any]]:
    """Configs worth measuring for some sizes; the first is a safe default."""
    return lib.tile_configs(lib.TILES, sizes, sizes.get("K", 4096))
