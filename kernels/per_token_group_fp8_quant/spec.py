"""per_token_group_fp8_quant: each group of 64 or 128 elements of a row to fp8 with a scale of its own, as the op of vLLM."""

from __future__ import annotations

from typing import Any

import torch
from hdispatch.opspec import BoolArg, FloatArg, Form, IntArg, OpSpec, TensorArg, Variant, VllmOp

from ..lib.model_sizes import quantized, rows
from ..lib.reference_fp8 import FP8, FP8_MAX, random_rows
from ..lib.reference_groups import poisoned_outputs, power_of_two, scaled_groups, store_clamped

NAME = "per_token_group_fp8_quant"


def reference(
    input: torch.Tensor,
    output_q: torch.Tensor,
    output_s: torch.Tensor,
    group_size: int,
    eps: float,
    fp8_min: float,
    fp8_max: float,
    scale_ue8m0: bool,
    dummy_is_scale_transposed: bool = False,  # noqa: ARG001
    dummy_is_tma_aligned: bool = False,  # noqa: ARG001
) -> None:
    """The op in torch.

    input        bfloat16 or float16 [M, K]
    output_q     float8_e4m3fn [M, K], written: clamp(input * (1 / scale), fp8_min, fp8_max)
    output_s     float32 [M, ceil(K / group_size)] of any strides, written: scale = max(max |group|, eps) / fp8_max
    group_size   elements of a row that share a scale
    eps          at least 0; vLLM passes 1e-10
    fp8_min/max  vLLM passes -448 and 448
    scale_ue8m0  the scale is rounded up to a power of two: exp2(ceil(log2(max(scale, 1e-10))))
    dummy_*      ignored, as in vLLM: the strides of output_s say how it lies

    All arithmetic is float32, and the reciprocal of the scale is rounded before it is multiplied by. As vLLM's kernel has
    it: NaN does not count in max |group|, and its code is fp8_min (0xfe of -448). An infinity makes the scale of its group
    infinite: its own code is fp8_min too, whatever its sign, and those of finite numbers are zeros of their signs.
    """
    groups, scale = scaled_groups(input, group_size, eps, fp8_max)
    if scale_ue8m0:
        scale = power_of_two(scale)
    output_s.copy_(scale)
    store_clamped(groups, scale, fp8_min, fp8_max, output_q)


def sample(variant: Variant, sizes: dict[str, int], device: torch.device, generator: torch.Generator) -> list[Any]:
    """Random arguments; `OpSpec` says the rest."""
    m, k, size = sizes["M"], sizes["K"], int(variant.static["group_size"])
    x = random_rows(m, k, variant.dtypes["input"], device, generator)
    output_q, output_s = poisoned_outputs(m, k, size, device)
    return [x, output_q, output_s, size, 1e-10, -FP8_MAX, FP8_MAX, bool(variant.static["scale_ue8m0"]), False, False]


SPEC = OpSpec(
    name=NAME,
    args=(
        TensorArg("input", ("M", "K"), (torch.bfloat16, torch.float16)),
        TensorArg("output_q", ("M", "K"), (FP8,), mutated=True),
        TensorArg("output_s", ("M", "K/group_size"), (torch.float32,), mutated=True, layout="any"),
        IntArg("group_size", values=(128, 64)),
        FloatArg("eps", minimum=0.0),
        FloatArg("fp8_min"),
        FloatArg("fp8_max"),
        BoolArg("scale_ue8m0"),
        BoolArg("dummy_is_scale_transposed", values=None),
        BoolArg("dummy_is_tma_aligned", values=None),
    ),
    reference=reference,
    sample=sample,
    shapes=(*rows(quantized, "hidden", "intermediate"), {}),
    calls=quantized,
    config_key={"hidden_size": "K", "num_tokens": "M"},
    vllm=VllmOp(NAME, (Form("output_s", "either"),)),
)
