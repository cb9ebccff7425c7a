"""argmax: the largest logit of each row, as torch.argmax finds it."""

from __future__ import annotations

from typing import Any

import torch
from hdispatch.errors import ArgumentError
from hdispatch.opspec import WORKSPACE_COUNTERS, OpSpec, TensorArg, Variant, WorkspaceArg

NAME = "argmax"

#: Parts of all rows together that there is memory for; a row in several parts has one of the workspace's counters.
PARTS = WORKSPACE_COUNTERS // 4


def reference(out: torch.Tensor, logits: torch.Tensor) -> None:
    """The op in torch.

    out     int64 [M], written: where the largest of a row is; of equal ones the first, 0 and -0 being equal. NaN is larger than
            all else
    logits  bfloat16, float16 or float32 [M, N], N at least 1; the stride of rows is free
    """
    if not logits.size(-1):
        raise ArgumentError(f"{NAME}: logits has rows of 0; expected at least 1 number in each")
    torch.argmax(logits, dim=-1, out=out)


def sample(variant: Variant, sizes: dict[str, int], device: torch.device, generator: torch.Generator) -> list[Any]:
    """Random arguments."""
    logits = torch.randn(sizes["M"], sizes["N"], device=device, generator=generator).to(variant.dtypes["logits"])
    return [torch.full((sizes["M"],), -7, device=device), logits]


SPEC = OpSpec(
    name=NAME,
    args=(
        TensorArg("out", ("M",), (torch.int64,), mutated=True),
        TensorArg("logits", ("M", "N"), (torch.bfloat16, torch.float16, torch.float32), layout="rows"),
    ),
    reference=reference,
    sample=sample,
    shapes=({},),
    config_key={"num_tokens": "M"},
    ladder=(2, 8, 32, 128, 256, 16384),
    hints={"N": 151936},
    typical="bfloat16",
    workspace=WorkspaceArg("workspace", 8 * PARTS),
)
