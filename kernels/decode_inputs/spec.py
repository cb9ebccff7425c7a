"""decode_inputs: all that vLLM's model runner prepares on the GPU for a step of one new token per request."""

from __future__ import annotations

from typing import Any

import torch
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
    is_padding: torch.Tensor,
    slot_mapping: torch.Tensor,
    block_table: torch.Tensor,
    idx_mapping: torch.Tensor,
    num_computed_tokens: torch.Tensor,
    last_sampled_tokens: torch.Tensor,
    source_block_table: torch.Tensor,
    page_size: int,
) -> None:
    """The op in torch.

    input_ids            int32 [M], written: the last sampled token of each request
    positions            int64 [M], written: its computed tokens, which is where the new one stands
    seq_lens             int32 [M], written: one more than that
    is_padding           uint8 [M], written: 0
    slot_mapping         int64 [M], written: the new token's place in the cache, its block * page_size + its place there
    block_table          int32 [M, N], written: the blocks of the request's first seq_lens tokens; the rest of a row stays
    idx_mapping          int64 [M]: the request's row in the following tensors
    num_computed_tokens  int32 [requests]
    last_sampled_tokens  int64 [requests]
    source_block_table   int32 [requests, N]
    page_size            tokens of a block
    """
    sources = num_computed_tokens, last_sampled_tokens, source_block_table
    check_indices(NAME, "idx_mapping", idx_mapping, min(each.size(0) for each in sources), "the requests' state")
    computed = num_computed_tokens[idx_mapping]
    block = computed // page_size
    check_indices(NAME, "num_computed_tokens // page_size", block, source_block_table.size(1), "a row of source_block_table")
    input_ids.copy_(last_sampled_tokens[idx_mapping])
    positions.copy_(computed)
    seq_lens.copy_(computed + 1)
    is_padding.zero_()
    taken = source_block_table[idx_mapping]
    slot_mapping.copy_(taken.gather(1, block[:, None].long()).squeeze(1).long() * page_size + computed % page_size)
    used = torch.arange(taken.size(1), device=taken.device) <= block[:, None]
    block_table.copy_(torch.where(used, taken, block_table))


def sample(_variant: Variant, sizes: dict[str, int], device: torch.device, generator: torch.Generator) -> list[Any]:
    """Random arguments: some requests more than the step has."""
    m, n = sizes["M"], sizes["N"]
    requests = m + 3
    order = torch.randperm(requests, device=device, generator=generator)[:m]
    blocks = torch.randperm(requests * n, device=device, generator=generator).to(torch.int32).view(requests, n)
    computed = torch.randint(n * PAGE, (requests,), device=device, generator=generator, dtype=torch.int32)
    last = torch.randint(150_000, (requests,), device=device, generator=generator)
    dtypes = torch.int32, torch.int64, torch.int32, torch.uint8, torch.int64
    written = [torch.full((m,), 99, dtype=dtype, device=device) for dtype in dtypes]
    written.append(torch.full((m, n), -7, dtype=torch.int32, device=device))
    return [*written, order, computed, last, blocks, PAGE]


SPEC = OpSpec(
    name=NAME,
    args=(
        TensorArg("input_ids", ("M",), INT, mutated=True),
        TensorArg("positions", ("M",), LONG, mutated=True),
        TensorArg("seq_lens", ("M",), INT, mutated=True),
        TensorArg("is_padding", ("M",), (torch.uint8,), mutated=True),
        TensorArg("slot_mapping", ("M",), LONG, mutated=True),
        TensorArg("block_table", ("M", "N"), INT, mutated=True),
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
)
