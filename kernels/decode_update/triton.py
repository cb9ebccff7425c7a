"""The Triton kernel of decode_update: a program takes a few requests."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from hdispatch.opspec import Variant

from ..lib.triton_launch import launch_options

GENERIC = ("N", "K")


@triton.jit
def decode_update(
    num_computed_tokens, last_sampled_tokens, total_len, all_token_ids, output_bin_counts, idx_mapping, sampled_tokens,
    requests, longest, words,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """longest and words: the rows of all_token_ids and output_bin_counts."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = at < requests
    if PDL:
        tl.extra.cuda.gdc_wait()
    request = tl.load(idx_mapping + at, here, other=0)
    token = tl.load(sampled_tokens + at, here, other=0)
    computed = tl.load(num_computed_tokens + request, here)
    length = tl.load(total_len + request, here, other=0)
    count = output_bin_counts + request * words + token
    seen = tl.load(count, here)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    tl.store(num_computed_tokens + request, computed + 1, here)
    tl.store(last_sampled_tokens + request, token, here)
    tl.store(total_len + request, length + 1, here)
    tl.store(all_token_ids + request * longest + length, token.to(tl.int32), here)
    tl.store(count, seen + 1, here)


def launch(
    num_computed_tokens, last_sampled_tokens, total_len, all_token_ids, output_bin_counts, idx_mapping, sampled_tokens, *,
    config, _launcher,
):  # fmt: skip
    """One program per `block` requests."""
    m = idx_mapping.size(0)
    written = (num_computed_tokens, last_sampled_tokens, total_len, all_token_ids, output_bin_counts)
    sizes = (m, all_token_ids.size(1), output_bin_counts.size(1))
    options = {"BLOCK": config["block"], **launch_options(config)}
    grid = ((m + config["block"] - 1) // config["block"],)
    _launcher(decode_update, grid, *written, idx_mapping, sampled_tokens, *sizes, **options)


def candidates(_sizes: dict[str, int], _variant: Variant) -> list[dict[str, Any]]:
    """The one config: as many requests as a warp has threads."""
    return [{"block": 32, "num_warps": 1}]
