"""The Triton kernel of decode_inputs: a program takes one request."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from hdispatch.opspec import Variant

from ..lib.triton_launch import launch_options

GENERIC = ("N",)


@triton.jit
def decode_inputs(
    input_ids, positions, seq_lens, is_padding, slot_mapping, block_table, idx_mapping, num_computed_tokens,
    last_sampled_tokens, source_block_table, page_size, columns,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """columns: of both block tables."""
    row = tl.program_id(0)
    if PDL:
        tl.extra.cuda.gdc_wait()
    request = tl.load(idx_mapping + row)
    computed = tl.load(num_computed_tokens + request)
    token = tl.load(last_sampled_tokens + request)
    source = source_block_table + request * columns
    last = computed // page_size
    block = tl.load(source + last).to(tl.int64)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    tl.store(input_ids + row, token.to(tl.int32))
    tl.store(positions + row, computed.to(tl.int64))
    tl.store(seq_lens + row, computed + 1)
    tl.store(slot_mapping + row, block * page_size + (computed - last * page_size))
    tl.store(is_padding + row, 0)
    table = block_table + row.to(tl.int64) * columns
    for begin in range(0, last + 1, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        tl.store(table + column, tl.load(source + column, column <= last), column <= last)


def launch(
    input_ids, positions, seq_lens, is_padding, slot_mapping, block_table, idx_mapping, num_computed_tokens,
    last_sampled_tokens, source_block_table, page_size, *, config, _launcher,
):  # fmt: skip
    """One program per request."""
    written = (input_ids, positions, seq_lens, is_padding, slot_mapping, block_table)
    state = (idx_mapping, num_computed_tokens, last_sampled_tokens, source_block_table)
    sizes, options = (page_size, source_block_table.size(1)), {"BLOCK": config["block"], **launch_options(config)}
    _launcher(decode_inputs, (idx_mapping.size(0),), *written, *state, *sizes, **options)


def candidates(_sizes: dict[str, int], _variant: Variant) -> list[dict[str, Any]]:
    """Configs worth measuring."""
    return [{"block": block, "num_warps": warps} for block, warps in ((128, 1), (256, 2), (512, 4))]
