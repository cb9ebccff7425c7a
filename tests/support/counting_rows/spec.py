"""The declaration of counting_rows."""

from __future__ import annotations

import torch
from hdispatch.opspec import BoolArg, Fallback, OpSpec, TensorArg, WorkspaceArg

ROWS, SPLITS = 64, 4


def reference(out, x, doubled):
    """out [M, 1] float32: the sum of each row of x [M, K], twice if `doubled`."""
    out.copy_(x.sum(1, keepdim=True) * (2 if doubled else 1))


def sample(variant, sizes, device, generator):
    m, k = sizes["M"], sizes["K"]
    x = torch.randn(m, k, generator=generator, device=device)
    return [torch.full((m, 1), float("nan"), device=device), x, variant.static["doubled"]]


SPEC = OpSpec(
    name="counting_rows",
    args=(
        TensorArg("out", ("M", 1), (torch.float32,), mutated=True),
        TensorArg("x", ("M", "K"), (torch.float32,)),
        BoolArg("doubled"),
    ),
    reference=reference,
    sample=sample,
    shapes=({"K": 64},),
    config_key={"width": "K", "rows": "M"},
    ladder=(16, ROWS),
    fallback=Fallback(reference, beyond_ladder=True),
    # the plain variant has room for more
    workspace=WorkspaceArg("memory", lambda variant: ROWS * 4 * SPLITS + (0 if variant.static["doubled"] else 1024)),
)
