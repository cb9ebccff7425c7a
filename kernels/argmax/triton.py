"""The Triton kernel of argmax: a program takes a part of a row, and the last one of a row compares the parts."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from hdispatch.opspec import WORKSPACE_COUNTERS, Variant

from ..lib.triton_argmax import column_of, keyed, ranked
from ..lib.triton_launch import launch_options
from .spec import PARTS

GENERIC = ("N",)

_COUNTERS = tl.constexpr(WORKSPACE_COUNTERS // 8)


@triton.jit
def argmax(out, logits, workspace, row_stride, columns, part, PARTS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Grid (parts, rows); a part has `part` columns, but the last, which may have fewer or none."""
    index = tl.program_id(0)
    row = tl.program_id(1)
    first = index * part
    end = tl.minimum(first + part, columns)
    base = logits + row.to(tl.int64) * row_stride
    best = tl.full([BLOCK], -0x80000000, tl.int32)
    where = tl.full([BLOCK], 0x7FFFFFFF, tl.int32)
    if PDL:
        tl.extra.cuda.gdc_wait()
    for begin in range(first, end, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        rank = ranked(tl.load(base + column, column < end, other=float("-inf")))
        # A lane's columns ascend: of equal ones it keeps the first.
        better = (rank > best) & (column < end)
        best = tl.where(better, rank, best)
        where = tl.where(better, column, where)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    found = tl.max(keyed(best, where), axis=0)
    if PARTS == 1:
        tl.store(out + row, column_of(found))
    else:
        counters = workspace.to(tl.pointer_type(tl.int32))
        parts = workspace + _COUNTERS + row * PARTS
        tl.store(parts + index, found)
        tl.debug_barrier()
        if tl.atomic_add(counters + row, 1, sem="acq_rel") == PARTS - 1:
            tl.store(counters + row, 0)
            all_parts = tl.load(parts + tl.arange(0, PARTS), cache_modifier=".cg")
            tl.store(out + row, column_of(tl.max(all_parts, axis=0)))


def launch(out, logits, workspace, *, config, _launcher):
    """config["parts"], a power of two, for each row."""
    rows, columns = logits.shape
    parts = config["parts"]
    if columns < 1 or columns >= 2**31 - 2**16:
        raise ValueError(f"argmax: rows of {columns}; the kernel takes 1 to {2**31 - 2**16 - 1}")
    if parts > 1 and rows * parts > PARTS:
        raise ValueError(f"argmax: {rows} rows in {parts} parts; the workspace has memory for {PARTS}")
    part = (columns + 16 * parts - 1) // (16 * parts) * 16
    options = {"PARTS": parts, "BLOCK": config["block"], **launch_options(config, config["num_stages"])}
    _launcher(argmax, (parts, rows), out, logits, workspace.view(torch.int64), logits.stride(0), columns, part, **options)


def candidates(sizes: dict[str, int], _variant: Variant) -> list[dict[str, Any]]:
    """Configs worth measuring: the fewer rows, the more parts."""
    counts = [parts for parts in (1, 2, 4, 8, 16, 32, 64, 128) if 64 <= sizes["M"] * parts <= 1024] or [1]
    tiles = [(2048, 4, 1), (4096, 8, 1), (2048, 4, 2), (4096, 4, 1)]
    return [
        {"parts": parts, "block": block, "num_warps": warps, "num_stages": stages}
        for parts in counts
        for block, warps, stages in tiles
    ]
