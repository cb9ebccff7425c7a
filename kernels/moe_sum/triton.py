"""The Triton kernel of moe_sum: a block of columns of one token per program, all of its experts' rows at once."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from hdispatch.opspec import Variant

from ..lib.triton_launch import launch_options

GENERIC = ("N",)


@triton.jit
def moe_sum(
    input, output, topk_ids, expert_map, topk, columns, token_stride, experts,
    SLOTS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (tokens, blocks of columns). SLOTS rows are asked for together: one after the other each would be waited for."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = column < columns
    source = input + token * token_stride + column
    if PDL:
        tl.extra.cuda.gdc_wait()
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, topk, SLOTS):
        slot = first + tl.arange(0, SLOTS)
        here = slot < topk
        if topk_ids is not None:
            expert = tl.load(topk_ids + token * topk + slot, here, other=-1)
            here = expert >= 0
            if expert_map is not None:
                here = here & (expert < experts)
                here = here & (tl.load(expert_map + expert, here, other=-1) >= 0)
        x = tl.load(source + slot.to(tl.int64)[:, None] * columns, here[:, None] & inside, other=0.0)
        total += tl.sum(x.to(tl.float32), 0)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    tl.store(output + token * columns + column, total[None, :].to(output.dtype.element_ty), inside)


def launch(input, output, topk_ids, expert_map, *, config, _launcher):
    """One program per token and `block` columns."""
    tokens, topk, columns = input.shape
    experts = 0 if expert_map is None else expert_map.size(0)
    grid = (tokens, (columns + config["block"] - 1) // config["block"])
    sizes = (topk, columns, input.stride(0), experts)
    blocks = {"SLOTS": config["slots"], "BLOCK": config["block"]}
    _launcher(moe_sum, grid, input, output, topk_ids, expert_map, *sizes, **blocks, **launch_options(config))


def candidates(sizes: dict[str, int], _variant: Variant) -> list[dict[str, Any]]:
    """Configs worth measuring: 8 elements of a row for each thread; few tokens are cut into more blocks."""
    blocks = (
        [(256, 1), (512, 2), (512, 1), (1024, 4), (1024, 2)]
        if sizes["M"] <= 64
        else [(1024, 4), (2048, 8), (512, 2), (1024, 2)]
    )
    return [{"slots": 8, "block": block, "num_warps": warps} for block, warps in blocks]
