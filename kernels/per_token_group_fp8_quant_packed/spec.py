"""per_token_group_fp8_quant_packed: groups of 128 elements to fp8, four UE8M0 scales to a 32-bit word, as the op of vLLM."""

from __future__ import annotations

from typing import Any

import torch
from hdispatch.errors import ArgumentError
from hdispatch.opspec import FloatArg, IntArg, OpSpec, TensorArg, Variant, VllmOp

from ..lib.model_sizes import quantized, rows
from ..lib.reference_fp8 import FP8, FP8_MAX, random_rows
from ..lib.reference_groups import poisoned_outputs, power_of_two, scaled_groups, store_clamped

NAME = "per_token_group_fp8_quant_packed"

#: Elements of a row that share a scale.
GROUP = 128


def reference(
    input: torch.Tensor,
    output_q: torch.Tensor,
    output_s_packed: torch.Tensor,
    group_size: int,
    eps: float,
    fp8_min: float,
    fp8_max: float,
) -> None:
    """The op in torch.

    input            bfloat16 or float16 [M, K]
    output_q         float8_e4m3fn [M, K], written: clamp(input * (1 / scale), fp8_min, fp8_max)
    output_s_packed  int32 [M, ceil(K / 512)] of any strides, written; vLLM's has the strides (1, M rounded up to 4)
    group_size       128 elements of a row share a scale
    eps              at least 0; vLLM passes 1e-10
    fp8_min/max      vLLM passes -448 and 448

    The scale is that of per_token_group_fp8_quant with scale_ue8m0, a power of two. Byte i of word j of a row, the lowest
    being byte 0, is the float32 exponent of the scale of group 4 j + i, with its bias of 127; 0 where a row has no such
    group. With vLLM's strides the words between one column and the next are written too: zeros. With others nothing is
    written there.

    NaN and infinities: see per_token_group_fp8_quant. The exponent of an infinite scale is 255.
    """
    if group_size != GROUP:
        raise ArgumentError(f"{NAME}: group_size is {group_size}; expected {GROUP}")
    groups, scale = scaled_groups(input, group_size, eps, fp8_max)
    scale = power_of_two(scale)
    exponents = (scale.view(torch.int32) >> 23).to(torch.uint8)
    padded = torch.nn.functional.pad(exponents, (0, -exponents.shape[1] % 4))
    output_s_packed.copy_(padded.contiguous().view(torch.int32) if padded.size(1) else padded)
    padding(output_s_packed).zero_()
    store_clamped(groups, scale, fp8_min, fp8_max, output_q)


def padding(packed: torch.Tensor) -> torch.Tensor:
    """The words behind each column of `packed` but the last, up to a multiple of four rows; none if its strides leave none."""
    rows, words = packed.shape
    pitch = (rows + 3) // 4 * 4
    if not rows or not words or packed.stride(1) != pitch or (rows > 1 and packed.stride(0) != 1):
        return packed[:0]
    return packed.as_strided((words - 1, pitch - rows), (pitch, 1), packed.storage_offset() + rows)


def sample(variant: Variant, sizes: dict[str, int], device: torch.device, generator: torch.Generator) -> list[Any]:
    """Random arguments, the scales laid out as vLLM's op takes them; `OpSpec` says the rest."""
    m, k, size = sizes["M"], sizes["K"], int(variant.static["group_size"])
    x = random_rows(m, k, variant.dtypes["input"], device, generator)
    output_q, _ = poisoned_outputs(m, k, size, device)
    rows, words = (m + 3) // 4 * 4, -(-k // (4 * size))
    packed = torch.full((words, rows), torch.iinfo(torch.int32).min, dtype=torch.int32, device=device).t()[:m]
    return [x, output_q, packed, size, 1e-10, -FP8_MAX, FP8_MAX]


SPEC = OpSpec(
    name=NAME,
    args=(
        TensorArg("input", ("M", "K"), (torch.bfloat16, torch.float16)),
        TensorArg("output_q", ("M", "K"), (FP8,), mutated=True),
        TensorArg("output_s_packed", ("M", "K/512"), (torch.int32,), mutated=True, layout="any"),
        IntArg("group_size", values=(GROUP,)),
        FloatArg("eps", minimum=0.0),
        FloatArg("fp8_min"),
        FloatArg("fp8_max"),
    ),
    reference=reference,
    sample=sample,
    shapes=(*rows(quantized, "hidden", "intermediate"), {}),
    calls=quantized,
    config_key={"hidden_size": "K", "num_tokens": "M"},
    vllm=VllmOp(NAME),
)
