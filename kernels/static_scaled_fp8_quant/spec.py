"""static_scaled_fp8_quant: the input to fp8 with one scale that is given, as the op of vLLM."""

from __future__ import annotations

from typing import Any

import torch
from hdispatch.errors import ArgumentError
from hdispatch.opspec import NoneArg, OpSpec, TensorArg, Variant, VllmOp

from ..lib.model_sizes import quantized, rows
from ..lib.reference_fp8 import FP8, FP8_MAX, random_rows, to_fp8

NAME = "static_scaled_fp8_quant"


def reference(result: torch.Tensor, input: torch.Tensor, scale: torch.Tensor, group_shape: list[int] | None = None) -> None:
    """The op in torch.

    result       float8_e4m3fn [M, K], written: clamp(input * (1 / scale), -448, 448); a NaN becomes 448
    input        bfloat16 or float16 [M, K], last dimension contiguous
    scale        float32 with one element
    group_shape  of no meaning to a scale of one element; what a scale with more elements needs

    All arithmetic is float32, and the reciprocal is rounded before it is multiplied by. What else vLLM's op
    takes has no kernel: a scale for each block of group_shape (rows, columns; -1 for all) elements, 2-D, or 1-D where the
    blocks lie in one row or column.
    """
    inverse = torch.ones_like(scale) / scale
    result.copy_(to_fp8(input.float() * _spread(inverse, input.shape, group_shape)))


def _spread(scale: torch.Tensor, shape: torch.Size, group_shape: list[int] | None) -> torch.Tensor:
    """The scale of each element, as a tensor that broadcasts to `shape`."""
    if scale.numel() == 1:
        return scale.reshape(())
    m, k = shape[:-1].numel(), shape[-1]
    blocks = tuple(scale.shape)
    if scale.dim() == 1:
        if group_shape is None or len(group_shape) != 2:
            raise ArgumentError(
                f"{NAME}: scale has {scale.numel()} elements in one dimension, which may be rows or columns; "
                "pass group_shape: (1, -1) for a scale per row, (-1, 1) for a scale per column"
            )
        sizes = [whole if part == -1 else part for part, whole in zip(group_shape, (m, k), strict=True)]
        blocks = (m // max(sizes[0], 1), k // max(sizes[1], 1))
    fits = len(blocks) == 2 and blocks[0] * blocks[1] == scale.numel()
    if not fits or (m * k and not all(blocks)) or m % max(blocks[0], 1) or k % max(blocks[1], 1):
        raise ArgumentError(
            f"{NAME}: scale has sizes {list(scale.shape)} and group_shape is {group_shape}; expected one element, or one "
            f"for each block of the [{m}, {k}] of input"
        )
    rows, columns = m // max(blocks[0], 1), k // max(blocks[1], 1)
    return scale.reshape(blocks).repeat_interleave(rows, 0).repeat_interleave(columns, 1).reshape(shape)


def sample(variant: Variant, sizes: dict[str, int], device: torch.device, generator: torch.Generator) -> list[Any]:
    """Random arguments; the scale clamps a few elements. `OpSpec` says the rest."""
    m, k = sizes["M"], sizes["K"]
    x = random_rows(m, k, variant.dtypes["input"], device, generator)
    result = torch.full((m, k), 0x7F, dtype=torch.uint8, device=device).view(FP8)
    return [result, x, torch.full((1,), 24.0 / FP8_MAX, device=device), None]


SPEC = OpSpec(
    name=NAME,
    args=(
        TensorArg("result", ("M", "K"), (FP8,), mutated=True),
        TensorArg("input", ("M", "K"), (torch.bfloat16, torch.float16), layout="rows"),
        TensorArg("scale", ("*",), (torch.float32,), flat=True),
        # With a scale of one element, which the kernel takes, it says nothing; vLLM's layers always give it.
        NoneArg("group_shape", "int[]?", ignored=True),
    ),
    reference=reference,
    sample=sample,
    shapes=(*rows(quantized, "hidden", "intermediate"), {}),
    calls=quantized,
    config_key={"hidden_size": "K", "num_tokens": "M"},
    vllm=VllmOp(NAME),
)
