"""decode_inputs: all that vLLM's model runner prepares on the GPU for a step of one new token per request."""

from __future__ import annotations

from typing import Any

import torch
from hdispatch.errors import ArgumentError
from hdispatch.opspec import IntArg, OpSpec, TensorArg, Variant

from ..lib.indices import check_indices

NAME = "decode_inputs"

#: Tokens of a block of a sample call's cache.
PAGE = 16
INT, LONG = (torch.int32,), (torch.int64,)


def reference(
    input_ids: torch.Tensor,
    positions: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    is_padding: torch.Tensor,
    block_table: torch.Tensor,
    slot_mapping: torch.Tensor,
    idx_mapping: torch.Tensor,
    num_computed_tokens: torch.Tensor,
    last_sampled_tokens: torch.Tensor,
    source_block_table: torch.Tensor,
    page_size: int,
) -> None:
    """The op in torch.

    Of each of M requests, in its row of the written tensors, which have at least M rows and whose others stay:

    input_ids            int32, written: the request's last sampled token
    positions            int64, written: its computed tokens, which is where the new one stands
    seq_lens             int32, written: one more than that
    query_start_loc      int32, at least M + 1, written: 0 to M
    is_padding           uint8, written: 0
    block_table          int32 [rows, N], written: the request's blocks of its first seq_lens tokens; the rest of a row stays
    slot_mapping         int64, written: the new token's place in the cache, its block * page_size + its place there
    idx_mapping          int64 [M]: the request's row in the following tensors, each once
    num_computed_tokens  int32
    last_sampled_tokens  int64
    source_block_table   int32 [requests, N]
    page_size            tokens of a block
    """
    m = idx_mapping.numel()
    rows = {"input_ids": input_ids, "positions": positions, "seq_lens": seq_lens, "is_padding": is_padding}
    rows |= {"block_table": block_table, "slot_mapping": slot_mapping}
    for name, tensor in rows.items():
        if tensor.size(0) < m:
            raise ArgumentError(f"{NAME}: {name} has {tensor.size(0)} rows; expected at least {m}, as idx_mapping has elements")
    if query_start_loc.size(0) < m + 1:
        raise ArgumentError(f"{NAME}: query_start_loc has {query_start_loc.size(0)} elements; expected at least {m + 1}")
    sources = num_computed_tokens, last_sampled_tokens, source_block_table
    check_indices(NAME, "idx_mapping", idx_mapping, min(each.size(0) for each in sources), "the requests' state")
    computed = num_computed_tokens[idx_mapping]
    block = computed // page_size
    check_indices(NAME, "num_computed_tokens // page_size", block, source_block_table.size(1), "a row of source_block_table")
    input_ids[:m] = last_sampled_tokens[idx_mapping].to(torch.int32)
    positions[:m] = computed
    seq_lens[:m] = computed + 1
    query_start_loc[: m + 1] = torch.arange(m + 1, dtype=torch.int32, device=query_start_loc.device)
    is_padding[:m] = 0
    taken = source_block_table[idx_mapping]
    used = torch.arange(taken.size(1), device=taken.device) <= block[:, None]
    block_table[:m] = torch.where(used, taken, block_table[:m])
    slot_mapping[:m] = taken.gather(1, block[:, None].long()).squeeze(1).long() * page_size + computed % page_size


def sample(_variant: Variant, sizes: dict[str, int], device: torch.device, generator: torch.Generator) -> list[Any]:
    """Random arguments: some requests more than the step has, and a row more in what is written."""
    m, n = sizes["M"], sizes["N"]
    requests = m + 3
    order = torch.randperm(requests, generator=generator)[:m]
    blocks = torch.randperm(requests * n, generator=generator, dtype=torch.int32).view(requests, n)
    computed = torch.randint(n * PAGE, (requests,), generator=generator, dtype=torch.int32)
    last = torch.randint(150_000, (requests,), generator=generator)
    ints, longs = (torch.full((m + 1,), -7, dtype=dtype) for dtype in (torch.int32, torch.int64))
    written = [ints, longs, ints, torch.full((m + 2,), -7, dtype=torch.int32), torch.full((m + 1,), 7, dtype=torch.uint8)]
    written += [torch.full((m + 1, n), -7, dtype=torch.int32), longs]
    return [*(each.to(device, copy=True) for each in (*written, order, computed, last, blocks)), PAGE]


SPEC = OpSpec(
    name=NAME,
    args=(
        TensorArg("input_ids", ("*",), INT, mutated=True),
        TensorArg("positions", ("*",), LONG, mutated=True),
        TensorArg("seq_lens", ("*",), INT, mutated=True),
        TensorArg("query_start_loc", ("*",), INT, mutated=True),
        TensorArg("is_padding", ("*",), (torch.uint8,), mutated=True),
        TensorArg("block_table", ("*", "N"), INT, mutated=True),
        TensorArg("slot_mapping", ("*",), LONG, mutated=True),
        TensorArg("idx_mapping", ("M",), LONG),
        TensorArg("num_computed_tokens", ("*",), INT),
        TensorArg("last_sampled_tokens", ("*",), LONG),
        TensorArg("source_block_table", ("*", "N"), INT),
        IntArg("page_size", minimum=1),
    ),
    reference=reference,
    sample=sample,
    shapes=({},),
    config_key={"num_tokens": "M"},
    ladder=(16384,),
    hints={"N": 128},
    doc=reference.__doc__ or "",
)
