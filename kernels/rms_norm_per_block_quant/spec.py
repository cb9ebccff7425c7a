"""rms_norm_per_block_quant: RMS norm, after adding a residual if given, then groups of a row to fp8, as the op of vLLM."""

from __future__ import annotations

from typing import Any

import torch
from hdispatch.opspec import BoolArg, FloatArg, Form, IntArg, OpSpec, TensorArg, Variant, VllmOp

from ..lib.model_sizes import hidden, rows
from ..lib.reference_fp8 import FP8, absmax, random_rows, upper_bound
from ..lib.reference_groups import (
    absmax_scale,
    bounded_scale,
    not_ub_and_ue8m0,
    poisoned_outputs,
    split_groups,
    store_groups,
    times_inverse,
)
from ..lib.reference_norm import random_weight, summed, twice_rounded

NAME = "rms_norm_per_block_quant"


def reference(
    result: torch.Tensor,
    input: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    epsilon: float,
    scale_ub: torch.Tensor | None,
    residual: torch.Tensor | None,
    group_size: int,
    is_scale_transposed: bool = False,  # noqa: ARG001
    scale_ue8m0: bool = False,
) -> None:
    """The op in torch.

    result               float8_e4m3fn [M, K], written: clamp(y * (1 / scale), -448, 448)
    input                bfloat16 or float16 [M, K], last dimension contiguous
    weight               [K], dtype of input
    scale                float32 [M, ceil(K / group_size)] of any strides, written:
                         max(min(max |y of the group|, scale_ub) / 448, 1 / (448 * 512))
    epsilon              added to the mean of the squares of a row, at least 0
    scale_ub             float32 with one element, or None
    residual             [M, K] contiguous, dtype of input, or None; read, and x is written to it
    group_size           elements of a row that share a scale
    is_scale_transposed  ignored: the strides of scale say how it lies
    scale_ue8m0          not in vLLM's op: that scale, bounded from below as it is, is then rounded up to a power of two,
                         exp2(ceil(log2(scale))); so it is at least 2**-17

    x = input + residual in float32, not rounded, though residual receives it rounded to its dtype. With
    r = rsqrt(mean(x * x) + epsilon) of the row, y = (x * r rounded to the dtype of input) * weight, rounded to it again.
    The reciprocal of the scale is rounded to float32 before it is multiplied by.

    NaN in x, which makes all of y NaN, has the least scales and codes of 448 (0x7e) as vLLM's kernel has: NaN does not
    count in max |y|. An infinite x, whose r is 0, is NaN in y, and the finite ones of its row are zeros of their signs. An
    infinite y, of a finite x, makes the scale of its group infinite; its own code is then 448, whatever its sign, and those
    of finite y are zeros of their signs. Where scale_ub keeps the scale finite, the code of an infinite y is 448 or -448.
    """
    x = summed(input, residual)
    if residual is not None:
        residual.copy_(x)
    groups = split_groups(twice_rounded(x, weight, epsilon), group_size)
    largest = absmax(groups)
    if scale_ub is not None:
        largest = torch.fmin(largest, scale_ub.reshape(()))
    scales = bounded_scale(absmax_scale(largest), scale_ue8m0)
    scale.copy_(scales)
    store_groups(times_inverse(groups, scales), result)


def sample(variant: Variant, sizes: dict[str, int], device: torch.device, generator: torch.Generator) -> list[Any]:
    """Random arguments; `OpSpec` says the rest."""
    m, k, dtype, size, epsilon = sizes["M"], sizes["K"], variant.dtypes["input"], int(variant.static["group_size"]), 1e-6
    x = random_rows(m, k, dtype, device, generator)
    weight = random_weight(k, dtype, device, generator)
    residual = None if "residual" in variant.none else random_rows(m, k, dtype, device, generator)
    scale_ub = None
    if "scale_ub" not in variant.none:
        y = twice_rounded(summed(x, residual), weight, epsilon)
        scale_ub = upper_bound(split_groups(y, size).flatten(0, 1))
    result, scale = poisoned_outputs(m, k, size, device)
    ue8m0 = bool(variant.static["scale_ue8m0"])
    return [result, x, weight, scale, epsilon, scale_ub, residual, size, False, ue8m0]


SPEC = OpSpec(
    name=NAME,
    args=(
        TensorArg("result", ("M", "K"), (FP8,), mutated=True),
        TensorArg("input", ("M", "K"), (torch.bfloat16, torch.float16), layout="rows"),
        TensorArg("weight", ("K",), "input"),
        TensorArg("scale", ("M", "K/group_size"), (torch.float32,), mutated=True, layout="any"),
        FloatArg("epsilon", minimum=0.0),
        TensorArg("scale_ub", (1,), (torch.float32,), optional=True, flat=True),
        TensorArg("residual", ("M", "K"), "input", mutated=True, optional=True),
        IntArg("group_size", values=(128, 64)),
        BoolArg("is_scale_transposed", values=None),
        BoolArg("scale_ue8m0", default=False),
    ),
    reference=reference,
    sample=sample,
    shapes=(*rows(hidden), {}),
    calls=hidden,
    config_key={"hidden_size": "K", "num_tokens": "M"},
    served=not_ub_and_ue8m0,
    # The least of the shapes: a config for rows of that size takes no longer ones.
    hints={"K": 2048},
    vllm=VllmOp(NAME, (Form("scale", "columns", flag="is_scale_transposed"),)),
)
