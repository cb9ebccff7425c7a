"""The Helion kernel of per_token_group_fp8_quant_packed: some words of scales, of four groups each, of some rows per program.

Rows are filled up to a multiple of four, where the scales lie as vLLM's op takes them.
"""

from __future__ import annotations

from typing import Any

import helion
import helion.language as hl
import torch
from hdispatch.opspec import Variant

from ..lib import helion_groups as lib
from ..lib.helion_groups import clamped_codes, eps_scale


# 64-bit offsets: see dynamic_per_token_scaled_fp8_quant.
@helion.kernel(static_shapes=False, index_dtype=torch.int64)
def per_token_group_fp8_quant_packed(
    input: torch.Tensor, output_q: torch.Tensor, output_s_packed: torch.Tensor, group_size: hl.constexpr, eps: float,
    fp8_min: float, fp8_max: float,
) -> None:  # fmt: skip
    m, k = input.size()
    words = hl.specialize(k) // (4 * group_size)
    # Words behind a column, up to a multiple of four rows, where they lie as in vLLM; behind the last one they are nobody's.
    behind = (m + 3) // 4 * 4 - m
    row_stride, word_stride = output_s_packed.stride(0), output_s_packed.stride(1)
    padding = output_s_packed.as_strided((behind, words - 1), (1, word_stride), output_s_packed.storage_offset() + m)
    x_groups = input.view(m, words, 4, group_size)
    q_groups = output_q.view(m, words, 4, group_size)
    hl.pdl_wait()
    for rows, word in hl.tile([m, words]):
        x = x_groups[rows, word, :, :].to(torch.float32)
        scale = eps_scale(x, eps, fp8_max, True)
        q_groups[rows, word, :, :] = clamped_codes(x, scale, fp8_min, fp8_max).to(output_q.dtype)
        exponents = (scale.view(torch.int32) >> 23) << (hl.arange(4) * 8)[None, None, :]
        output_s_packed[rows, word] = torch.sum(exponents, dim=-1, dtype=torch.int32)
        line = hl.arange(4, dtype=torch.int32)
        at = line[:, None] + word.index[None, :] * 0
        # The stride of one row means nothing.
        as_vllm = (at * 0 + word_stride == m + behind) & ((at * 0 + row_stride == 1) | (at * 0 + m == 1))
        as_vllm = as_vllm & (at < behind) & (word.index < words - 1)[None, :] & (at * 0 + rows.end >= m)
        hl.store(padding, [line, word], at.to(torch.int32) * 0, extra_mask=as_vllm)


KERNEL = per_token_group_fp8_quant_packed


def check(input: torch.Tensor, _output_q: torch.Tensor, _output_s_packed: torch.Tensor, group_size: int, *_: Any) -> None:
    """ValueError for rows with a last word of fewer groups, which the kernel does not take."""
    if input.size(1) % (4 * group_size):
        raise ValueError(f"rows of {input.size(1)} elements; the Helion kernel takes multiples of {4 * group_size}")


def candidates(sizes: dict[str, int], _variant: Variant) -> list[dict[str, Any]]:
    """Configs worth measuring."""
    return lib.candidates(sizes["M"], sizes["K"] // 512, 512)
