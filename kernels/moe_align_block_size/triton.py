"""The Triton kernel of moe_align_block_size: one launch, in which every program counts all rows and places its experts'.

To count is cheap: a decode step has some hundred ids, which lie in the level 2 cache. So programs need nothing of each other,
no counters, no order, and where an expert's rows lie in it follows from the ids alone.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from hdispatch.opspec import Variant

from ..lib.triton_launch import launch_options
from .spec import LADDER

#: Each program, of a few experts, reads all rows for every few hundred experts: work grows with the square of their number.
MOST_EXPERTS = 2**15


@triton.jit
def _experts_of(topk_ids, expert_map, row, rows, num_experts, mapped):
    """The expert of each row, and whether it has one here."""
    expert = tl.load(topk_ids + row, row < rows, other=-1)
    here = (expert >= 0) & (expert < num_experts)
    if expert_map is not None:
        expert = tl.load(expert_map + expert, here & (expert < mapped), other=-1)
        here = (expert >= 0) & (expert < num_experts)
    return tl.where(here, expert, 0).to(tl.int32), here


@triton.jit
def _ranks(ones, AXIS: tl.constexpr):
    """Of each one its number along the last two dimensions, AXIS the last, from 0; and how many there are in all.

    Of the last one a thread has all elements: scans of what each has are shorter than one scan of all elements.
    """
    sums = tl.sum(ones, AXIS)
    before = tl.cumsum(sums, AXIS - 1) - sums
    return tl.expand_dims(before, AXIS) + tl.cumsum(ones, AXIS) - 1, tl.sum(sums, AXIS - 1)


@triton.jit
def moe_align_block_size(
    topk_ids, sorted_token_ids, experts_ids, num_tokens_post_pad, expert_map,
    rows, num_experts, block_size, room, blocks, mapped,
    EXPERTS: tl.constexpr, MINE: tl.constexpr, ROWS: tl.constexpr, FILL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """MINE experts per program; EXPERTS are counted and ROWS read at once; room, blocks, mapped: elements of tensors."""
    program = tl.program_id(0)
    if PDL:
        tl.extra.cuda.gdc_wait()
    mine = (program * MINE + tl.arange(0, MINE))[:, None]
    total = 0
    begin = tl.zeros([MINE], tl.int32)
    counted = tl.zeros([MINE], tl.int32)
    padded_mine = tl.zeros([MINE], tl.int32)
    for first in range(0, num_experts, EXPERTS):  # once for most models
        counts = tl.zeros([EXPERTS], tl.int32)
        for start in range(0, rows, ROWS):
            row = tl.cast(start, tl.int64) + tl.arange(0, ROWS)
            expert, here = _experts_of(topk_ids, expert_map, row, rows, num_experts, mapped)
            here = here & (expert >= first) & (expert < first + EXPERTS)
            counts += tl.histogram(tl.where(here, expert - first, 0), EXPERTS, mask=here)
        padded = (counts + (block_size - 1)) // block_size * block_size
        experts = first + tl.arange(0, EXPERTS)[None, :]
        total += tl.sum(padded)
        begin += tl.sum(tl.where(experts < mine, padded[None, :], 0), 1)
        counted += tl.sum(tl.where(experts == mine, counts[None, :], 0), 1)
        padded_mine += tl.sum(tl.where(experts == mine, padded[None, :], 0), 1)
    end = begin + padded_mine
    # My experts' rows, in ascending order.
    placed = begin
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS // 4)[:, None] * 4 + tl.arange(0, 4)[None, :]
        expert, here = _experts_of(topk_ids, expert_map, row.to(tl.int64), rows, num_experts, mapped)
        if MINE == 1:  # with a dimension more 4,096 ids take 18 % longer
            here = here & (expert == program)
            rank, found = _ranks(here.to(tl.int32), 1)
            to = tl.sum(placed) + rank
        else:
            here = here[None, :, :] & (expert[None, :, :] == mine[:, :, None])
            rank, found = _ranks(here.to(tl.int32), 2)
            to = placed[:, None, None] + rank
            row = tl.broadcast_to(row[None, :, :], here.shape)
        tl.store(sorted_token_ids + to, row, here & (to < room))
        if start + ROWS < rows:
            placed += found
    placed = begin + counted
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    # What fills up their blocks, and the blocks' experts.
    none = tl.cast(rows, tl.int32)
    step = tl.arange(0, FILL)[None, :]
    for start in range(0, tl.max(end - placed), FILL):
        to = placed[:, None] + start + step
        tl.store(sorted_token_ids + to, tl.full([MINE, FILL], none, tl.int32), (to < end[:, None]) & (to < room))
    for start in range(0, tl.max((end - begin) // block_size), FILL):
        to = (begin // block_size)[:, None] + start + step
        last = tl.minimum(end // block_size, blocks)
        tl.store(experts_ids + to, tl.broadcast_to(mine, [MINE, FILL]), to < last[:, None])
    # What lies behind the last block, in turns.
    stride = tl.num_programs(0) * FILL
    each = tl.arange(0, FILL)
    for start in range(total + program * FILL, room, stride):
        tl.store(sorted_token_ids + start + each, tl.full([FILL], none, tl.int32), start + each < room)
    needed = tl.minimum((room + block_size - 1) // block_size, blocks)
    for start in range(total // block_size + program * FILL, needed, stride):
        tl.store(experts_ids + start + each, tl.full([FILL], -1, tl.int32), start + each < needed)
    if program == 0:
        tl.store(num_tokens_post_pad, total)


def launch(
    topk_ids, num_experts, block_size, sorted_token_ids, experts_ids, num_tokens_post_pad, maybe_expert_map, *,
    config, _launcher,
):  # fmt: skip
    """One program per `mine` experts."""
    if topk_ids.size(0) > LADDER[-1]:
        raise ValueError(f"moe_align_block_size: {topk_ids.size(0)} tokens; the kernel is for up to {LADDER[-1]}")
    if num_experts > MOST_EXPERTS:
        raise ValueError(f"moe_align_block_size: {num_experts} experts; the kernel is for up to {MOST_EXPERTS}")
    rows = topk_ids.size(0) * topk_ids.size(1)
    if rows + num_experts * (block_size - 1) >= 2**31:
        said = f"{rows} rows, {num_experts} experts, blocks of {block_size}"
        raise ValueError(f"moe_align_block_size: {said}; the kernel counts filled blocks in 32 bits")
    tensors = (topk_ids, sorted_token_ids, experts_ids, num_tokens_post_pad, maybe_expert_map)
    mapped = 0 if maybe_expert_map is None else maybe_expert_map.size(0)
    sizes = (rows, num_experts, block_size, sorted_token_ids.size(0), experts_ids.size(0), mapped)
    options = {"EXPERTS": config["experts"], "MINE": config["mine"], "ROWS": config["rows"], "FILL": config["fill"]}
    grid = ((num_experts + config["mine"] - 1) // config["mine"],)
    _launcher(moe_align_block_size, grid, *tensors, *sizes, **options, **launch_options(config))


def candidates(sizes: dict[str, int], _variant: Variant) -> list[dict[str, Any]]:
    """Configs worth measuring: as many ids at once as eight per token are, up to what registers hold."""
    experts = triton.next_power_of_2(sizes["num_experts"])
    ids = max(32, triton.next_power_of_2(8 * sizes["M"]))
    # (rows at once, experts of a program, warps)
    if ids <= 64:
        tiles = [(ids, 1, 1), (ids, 1, 2), (ids, 2, 2), (ids, 4, 4)]
    elif ids <= 512:
        tiles = [(ids, 1, 4), (ids, 1, 8), (ids, 2, 4), (ids, 4, 8), (ids // 2, 1, 4)]
    else:
        tiles = [(ids, 1, 4), (ids, 1, 8), (ids, 2, 8), (ids, 4, 8), (ids, 4, 16), (ids // 2, 1, 8)]
    return [
        {"experts": experts, "mine": mine, "rows": rows, "fill": max(64, 32 * warps), "num_warps": warps}
        for rows, mine, warps in tiles
    ]
