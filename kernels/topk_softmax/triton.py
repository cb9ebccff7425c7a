"""The Triton kernel of topk_softmax: some rows per program, each in the registers of one warp."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from hdispatch.opspec import Variant

from ..lib.triton_launch import launch_options

GENERIC = ("N",)

#: Experts that a row of the generic kernel may have, and experts per token of any.
MOST_EXPERTS, MOST_TOPK = 512, 16

_LOWEST = tl.constexpr(-0x8000000000000000)


@triton.jit
def topk_softmax(
    topk_weights, topk_indices, token_expert_indices, gating_output, bias, is_padding, tokens, topk, experts,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, TOPK: tl.constexpr, RENORMALIZE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """ROWS tokens; BLOCK is a power of two that holds a row, TOPK one that holds its choices."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < tokens
    column = tl.arange(0, BLOCK)[None, :]
    valid = column < experts
    if PDL:
        tl.extra.cuda.gdc_wait()
    at = row.to(tl.int64)[:, None] * experts + column
    x = tl.load(gating_output + at, inside[:, None] & valid, other=float("-inf")).to(tl.float32)
    if is_padding is not None:
        padding = tl.load(is_padding + row, inside, other=False)
    if bias is not None:
        correction = tl.load(bias + column, valid, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    # A NaN, an infinity, or minus infinities alone make every element NaN; then all are 0, as in vLLM.
    x -= tl.max(x, 1)[:, None]
    # exp by the hardware's exp2, with what the product by log2(e) loses put back: as near as the float32 reference.
    power = x * 1.4426950408889634
    e = tl.exp2(power)
    e = tl.where(power == float("-inf"), 0.0, e + e * (tl.fma(x, 1.4426950408889634, -power) * 0.6931471805599453))
    softmax = e * (1.0 / tl.sum(e, 1))[:, None]
    softmax = tl.where((softmax == softmax) & (softmax < float("inf")), softmax, 0.0)
    choice = softmax
    if bias is not None:
        choice += correction
    # One integer that compares as (choice, lower expert) does; choices may be below 0 where there is a bias.
    rank = (choice + 0.0).to(tl.int32, bitcast=True)
    rank = tl.where(rank < 0, rank ^ 0x7FFFFFFF, rank)
    key = tl.where(valid, (rank.to(tl.int64) << 32) | (0x7FFFFFFF - column).to(tl.int64), _LOWEST)
    slot = tl.arange(0, TOPK)[None, :]
    weights = tl.zeros([ROWS, TOPK], tl.float32)
    chosen = tl.zeros([ROWS, TOPK], tl.int32)
    for number in range(topk):
        best = tl.max(key, 1)
        expert = 0x7FFFFFFF - (best & 0x7FFFFFFF).to(tl.int32)
        taken = column == expert[:, None]
        if bias is not None:
            weight = tl.sum(tl.where(taken, softmax, 0.0), 1)
        else:
            weight = (best >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        key = tl.where(taken, _LOWEST, key)
        weights = tl.where(slot == number, weight[:, None], weights)
        chosen = tl.where(slot == number, expert[:, None], chosen)
    if RENORMALIZE:
        total = tl.sum(weights, 1)
        weights = weights * (1.0 / tl.where(total > 0.0, total, 1.0))[:, None]
    if is_padding is not None:
        chosen = tl.where(padding[:, None], -1, chosen)
    there = inside[:, None] & (slot < topk)
    to = row.to(tl.int64)[:, None] * topk + slot
    tl.store(topk_weights + to, weights, there)
    tl.store(topk_indices + to, chosen.to(topk_indices.dtype.element_ty), there)
    tl.store(token_expert_indices + to, slot * tokens + row[:, None], there)


def launch(
    topk_weights, topk_indices, token_expert_indices, gating_output, renormalize, bias, is_padding, *, config, _launcher
):  # fmt: skip
    """One program per `rows` rows."""
    tokens, topk, experts = topk_weights.size(0), topk_weights.size(1), gating_output.size(1)
    if experts > config["block"] or topk > config["topk"]:
        raise ValueError(f"{topk} of {experts} experts; this kernel takes up to {config['topk']} of {config['block']}")
    if topk > experts:
        raise ValueError(f"{topk} of {experts} experts")
    tensors = (topk_weights, topk_indices, token_expert_indices, gating_output, bias, is_padding)
    blocks = {"ROWS": config["rows"], "BLOCK": config["block"], "TOPK": config["topk"], "RENORMALIZE": renormalize}
    grid = ((tokens + config["rows"] - 1) // config["rows"],)
    _launcher(topk_softmax, grid, *tensors, tokens, topk, experts, **blocks, **launch_options(config))


def candidates(sizes: dict[str, int], _variant: Variant) -> list[dict[str, Any]]:
    """Configs worth measuring: a row per warp, or two; the fewer tokens, the fewer rows in a program."""
    block = max(16, triton.next_power_of_2(sizes["N"])) if "N" in sizes else MOST_EXPERTS
    pairs = [(1, 1), (2, 1), (2, 2), (4, 4), (8, 4)] if sizes["M"] <= 256 else [(4, 4), (8, 4), (4, 2), (8, 8), (16, 4)]
    return [{"rows": rows, "block": block, "topk": MOST_TOPK, "num_warps": warps} for rows, warps in pairs]
