"""decode_update: what vLLM's model runner keeps of a step in which every request got one token."""

from __future__ import annotations

from typing import Any

import torch
from hdispatch.opspec import OpSpec, TensorArg, Variant

from ..lib.indices import check_indices

NAME = "decode_update"

INT, LONG = (torch.int32,), (torch.int64,)


def reference(
    num_computed_tokens: torch.Tensor,
    last_sampled_tokens: torch.Tensor,
    total_len: torch.Tensor,
    all_token_ids: torch.Tensor,
    output_bin_counts: torch.Tensor,
    idx_mapping: torch.Tensor,
    sampled_tokens: torch.Tensor,
) -> None:
    """The op in torch.

    Of each of M requests, in its row idx_mapping[m] of the written tensors, whose other rows stay:

    num_computed_tokens  int32, written: one more
    last_sampled_tokens  int64, written: the sampled token
    total_len            int32, written: one more
    all_token_ids        int32 [requests, N], written: the sampled token, at what total_len was
    output_bin_counts    int32 [requests, K], written: one more of the sampled token
    idx_mapping          int64 [M], no row twice
    sampled_tokens       int64 with M elements: [M] or [M, 1]
    """
    written = num_computed_tokens, last_sampled_tokens, total_len, all_token_ids, output_bin_counts
    check_indices(NAME, "idx_mapping", idx_mapping, min(each.size(0) for each in written), "the requests' state")
    check_indices(NAME, "sampled_tokens", sampled_tokens, output_bin_counts.size(1), "a row of output_bin_counts")
    length = total_len[idx_mapping]
    check_indices(NAME, "total_len", length, all_token_ids.size(1), "a row of all_token_ids")
    tokens = sampled_tokens.reshape(-1)
    all_token_ids[idx_mapping, length.long()] = tokens.to(torch.int32)
    output_bin_counts[idx_mapping, tokens] += 1
    last_sampled_tokens[idx_mapping] = tokens
    total_len[idx_mapping] = length + 1
    num_computed_tokens[idx_mapping] += 1


def sample(_variant: Variant, sizes: dict[str, int], device: torch.device, generator: torch.Generator) -> list[Any]:
    """Random arguments: some requests more than the step has."""
    m, n, k = sizes["M"], sizes["N"], sizes["K"]
    requests = m + 3
    order = torch.randperm(requests, device=device, generator=generator)[:m]
    computed = torch.randint(n, (requests,), device=device, generator=generator, dtype=torch.int32)
    counts = torch.randint(5, (requests, k), device=device, generator=generator, dtype=torch.int32)
    last = torch.full((requests,), -7, device=device)
    ids = torch.full((requests, n), -7, dtype=torch.int32, device=device)
    sampled = torch.randint(k, (m, 1), device=device, generator=generator)
    return [computed, last, computed.clone(), ids, counts, order, sampled]


SPEC = OpSpec(
    name=NAME,
    args=(
        TensorArg("num_computed_tokens", ("*",), INT, mutated=True),
        TensorArg("last_sampled_tokens", ("*",), LONG, mutated=True),
        TensorArg("total_len", ("*",), INT, mutated=True),
        TensorArg("all_token_ids", ("*", "N"), INT, mutated=True),
        TensorArg("output_bin_counts", ("*", "K"), INT, mutated=True),
        TensorArg("idx_mapping", ("M",), LONG),
        TensorArg("sampled_tokens", ("M",), LONG, flat=True),
    ),
    reference=reference,
    sample=sample,
    shapes=({},),
    config_key={"num_tokens": "M"},
    ladder=(16384,),
    hints={"N": 2048, "K": 4096},
)
