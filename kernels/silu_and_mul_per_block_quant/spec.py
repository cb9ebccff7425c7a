"""silu_and_mul_per_block_quant: silu(gate) * up, each group of 64 or 128 elements to fp8 with a scale of its own."""

from __future__ import annotations

from typing import Any

import torch
from hdispatch.opspec import BoolArg, Form, IntArg, OpSpec, TensorArg, Variant, VllmOp

from ..lib.model_sizes import activated, rows
from ..lib.reference_fp8 import FP8, FP8_MAX, absmax, random_rows, silu_and_mul, upper_bound
from ..lib.reference_groups import absmax_scale, bounded_scale, not_ub_and_ue8m0, poisoned_outputs, split_groups, store_groups

NAME = "silu_and_mul_per_block_quant"


def reference(
    out: torch.Tensor,
    input: torch.Tensor,
    scales: torch.Tensor,
    group_size: int,
    scale_ub: torch.Tensor | None = None,
    is_scale_transposed: bool = False,  # noqa: ARG001
    scale_ue8m0: bool = False,
) -> None:
    """The op in torch.

    out                  float8_e4m3fn [M, N], written: clamp(x / scale, -448, 448)
    input                bfloat16 or float16 [M, 2 * N]: gate in the first half of a row, up in the second
    scales               float32 [M, ceil(N / group_size)] of any strides, written:
                         scale = max(min(max |x of the group| / 448, scale_ub), 1 / (448 * 512))
    group_size           elements of a row that share a scale
    scale_ub             float32 with one element, or None: bounds the scale itself, unlike in the other ops
    is_scale_transposed  ignored: the strides of scales say how they lie, and scales[m, g] is the scale of group g of row m;
                         padding is not written. vLLM's kernel knows no strides: it writes the scales one behind the other,
                         column by column with the flag, which is the same unless scales are padded
    scale_ue8m0          not in vLLM's op: that scale, bounded from below as it is, is then rounded up to a power of two,
                         exp2(ceil(log2(scale))); so it is at least 2**-17

    x = gate * (1 / (1 + exp(-gate))) * up in float32, never rounded to the dtype of input. Signs of zeros are kept.

    As vLLM's kernel has it: NaN does not count in max |x|, and its code is 448 (0x7e); a gate of -inf makes one. The scale of
    a group of NaNs alone is scale_ub, or the least one without it. An
    infinite x makes the scale of its group infinite; its own code is then 448, whatever its sign, and those of finite x are
    zeros of their signs. Where scale_ub keeps the scale finite, the code of an infinite x is 448 or -448.
    """
    groups = split_groups(silu_and_mul(input), group_size)
    scale = absmax_scale(absmax(groups))
    if scale_ub is not None:
        bound = scale_ub.reshape(())
        scale = torch.where(groups.isnan().all(-1), torch.fmax(bound, torch.zeros_like(bound)), torch.fmin(scale, bound))
    scale = bounded_scale(scale, scale_ue8m0)
    scales.copy_(scale)
    store_groups(groups / scale.unsqueeze(-1), out)


def sample(variant: Variant, sizes: dict[str, int], device: torch.device, generator: torch.Generator) -> list[Any]:
    """Random arguments; `OpSpec` says the rest."""
    m, n, size = sizes["M"], sizes["N"], int(variant.static["group_size"])
    x = random_rows(m, 2 * n, variant.dtypes["input"], device, generator)
    scale_ub = None
    if "scale_ub" not in variant.none:
        scale_ub = upper_bound(split_groups(silu_and_mul(x), size).flatten(0, 1)) / FP8_MAX
    out, scales = poisoned_outputs(m, n, size, device)
    return [out, x, scales, size, scale_ub, False, bool(variant.static["scale_ue8m0"])]


SPEC = OpSpec(
    name=NAME,
    args=(
        TensorArg("out", ("M", "N"), (FP8,), mutated=True),
        TensorArg("input", ("M", "2*N"), (torch.bfloat16, torch.float16)),
        TensorArg("scales", ("M", "N/group_size"), (torch.float32,), mutated=True, layout="any"),
        IntArg("group_size", values=(128, 64)),
        TensorArg("scale_ub", (1,), (torch.float32,), optional=True, flat=True),
        BoolArg("is_scale_transposed", values=None, default=False),
        BoolArg("scale_ue8m0", default=False),
    ),
    reference=reference,
    sample=sample,
    shapes=(*rows(activated), {}),
    calls=activated,
    config_key={"intermediate_size": "N", "num_tokens": "M"},
    served=not_ub_and_ue8m0,
    vllm=VllmOp(NAME, (Form("scales", "packed", flag="is_scale_transposed"),)),
)
