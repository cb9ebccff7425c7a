"""moe_align_block_size: the rows of each expert side by side, in whole blocks for a grouped product, as the op of vLLM."""

from __future__ import annotations

from typing import Any

import torch
from hdispatch.errors import ArgumentError
from hdispatch.opspec import Fallback, IntArg, OpSpec, TensorArg, Variant, VllmOp

from ..lib.model_sizes import experts_of_any_number

NAME = "moe_align_block_size"

INT = (torch.int32,)
#: Experts per token, experts, and rows of a block, in samples that do not say how many.
TOPK, EXPERTS, BLOCK = 8, 128, 16

#: Every program counts all rows: 1.6 to 5.9 us up to 512 tokens of 128 experts on an H200, and in proportion for more: there
#: vLLM's kernel, or torch, is to take the call.
LADDER = (8, 64, 128, 256, 512)


def reference(
    topk_ids: torch.Tensor,
    num_experts: int,
    block_size: int,
    sorted_token_ids: torch.Tensor,
    experts_ids: torch.Tensor,
    num_tokens_post_pad: torch.Tensor,
    maybe_expert_map: torch.Tensor | None = None,
) -> None:
    """The op in torch.

    topk_ids             int32 or int64 [M, A]: the experts of each of M tokens. Row m * A + a is the a-th of token m
    num_experts          experts that there are; a row of an id that is negative or not less is left out
    block_size           rows of a block
    sorted_token_ids     int32, written: the rows of expert 0, then those of expert 1, …; each expert's are filled up to whole
                         blocks with M * A, which is no row, and so is what lies behind the last one's
    experts_ids          int32, written: the expert of each block of sorted_token_ids; -1 behind the last one. It has an
                         element for each block that sorted_token_ids has room for; further ones are not written
    num_tokens_post_pad  int32 with one element, written: rows in all blocks, with those that fill them up
    maybe_expert_map     int32, or None: the number of each expert on this GPU, by which experts are then counted and sorted.
                         The rows of one whose number is negative or not less than num_experts, or that is beyond the map,
                         are left out

    An expert's rows are in ascending order. vLLM's kernel has them in any order; here every call gives the same.
    """
    rows, room = topk_ids.numel(), sorted_token_ids.numel()
    for name, value in (("num_experts", num_experts), ("block_size", block_size)):
        if value >= 2**31:
            raise ArgumentError(f"{NAME}: {name} is {value}; it takes at most {2**31 - 1}, what int32 results can hold")
    blocks = (room + block_size - 1) // block_size
    if experts_ids.numel() < blocks:
        raise ArgumentError(
            f"{NAME}: experts_ids has {experts_ids.numel()} elements; expected {blocks}, one for each block of sorted_token_ids"
        )
    ids = topk_ids.flatten().long()
    known = (ids >= 0) & (ids < num_experts)
    if maybe_expert_map is not None:
        # Its last one, -1, is that of what is no expert or beyond the map.
        numbers = torch.cat([maybe_expert_map.long(), ids.new_full((1,), -1)])
        ids = numbers[torch.where(known, ids, -1).clamp(max=numbers.numel() - 1)]
        known &= (ids >= 0) & (ids < num_experts)
    # Rows by expert, those of none behind. Nothing here is as long as there are experts: the number is the caller's.
    ids, order = torch.sort(torch.where(known, ids, num_experts), stable=True)
    row, begin = torch.arange(rows, device=ids.device), torch.searchsorted(ids, ids)
    count = torch.searchsorted(ids, ids, right=True) - begin
    padded = torch.where(ids < num_experts, (count + (block_size - 1)) // block_size * block_size, 0)
    ends = torch.where(row == begin, padded, 0).cumsum(0)
    total = ends[-1:] if rows else ends.new_zeros(1)
    if ids.device.type == "cpu" and int(total) > room:  # on a GPU the host would wait
        raise ArgumentError(f"{NAME}: sorted_token_ids has {room} elements; the rows and what fills up blocks are {int(total)}")
    num_tokens_post_pad.copy_(total)
    first = torch.arange(blocks, device=ids.device) * block_size
    experts = torch.cat([ids, ids.new_full((1,), -1)])
    experts_ids[:blocks] = experts[torch.searchsorted(ends, first, right=True)].to(torch.int32)
    to = torch.where(ids < num_experts, ends - padded + (row - begin), room).clamp(max=room)
    filled = torch.full((room + 1,), rows, dtype=torch.int32, device=ids.device)
    filled[to] = order.to(torch.int32)
    sorted_token_ids.copy_(filled[:room])


def padded_rows(rows: int, num_experts: int, block_size: int) -> int:
    """Elements of sorted_token_ids, as vLLM makes it."""
    most = rows + num_experts * (block_size - 1)
    return min(rows * block_size, most) if rows < num_experts else most


def sample(variant: Variant, sizes: dict[str, int], device: torch.device, generator: torch.Generator) -> list[Any]:
    """Random arguments. A few ids are no expert; with a map, half of the experts are on this GPU."""
    m, topk, experts = sizes["M"], sizes.get("A", TOPK), sizes.get("num_experts", EXPERTS)
    ids = torch.randint(-1, experts + 1, (m, topk), generator=generator, device=device).to(variant.dtypes["topk_ids"])
    room = padded_rows(m * topk, experts, BLOCK)
    placed = None
    if "maybe_expert_map" in variant.dtypes:
        placed = torch.arange(experts, dtype=torch.int32, device=device) - experts // 2
        placed = torch.where(placed >= 0, placed, -1)
    made = [torch.full((size,), -7, dtype=torch.int32, device=device) for size in (room, (room + BLOCK - 1) // BLOCK, 1)]
    return [ids, experts, BLOCK, *made, placed]


def served(variant: Variant) -> bool:
    """int32, as vLLM's Triton experts have the ids. int64 on request."""
    return variant.dtypes["topk_ids"] == torch.int32


SPEC = OpSpec(
    name=NAME,
    args=(
        TensorArg("topk_ids", ("M", "A"), (torch.int32, torch.int64)),
        IntArg("num_experts", minimum=1, ladder=(128, 512)),
        IntArg("block_size", minimum=1),
        TensorArg("sorted_token_ids", ("*",), INT, mutated=True),
        TensorArg("experts_ids", ("*",), INT, mutated=True),
        TensorArg("num_tokens_post_pad", (1,), INT, mutated=True),
        TensorArg("maybe_expert_map", ("*",), INT, optional=True),
    ),
    reference=reference,
    sample=sample,
    shapes=({},),
    calls=experts_of_any_number,
    config_key={"num_tokens": "M", "num_experts": "num_experts"},
    ladder=LADDER,
    fallback=Fallback(reference, beyond_ladder=True),
    served=served,
    typical="int32",
    vllm=VllmOp(NAME, namespace="_moe_C"),
)
