"""An op with a second ladder: sums over the first `length` of a row's elements, in chunks whose size is the config's."""

from __future__ import annotations

import torch
from hdispatch.opspec import FloatArg, IntArg, OpSpec, TensorArg

LADDER = (1, 4, 16)
LENGTHS = (128, 512, 2048)


def reference(out, x, lengths, longest, scale):
    """out [M, 1] float32: of each row of x [M, K] the sum of its first lengths[row] elements, at most `longest`."""
    for row, length in enumerate(lengths.tolist()):
        out[row, 0] = x[row, : min(length, longest)].float().sum() * scale


def sample(variant, sizes, device, generator):
    m, k, longest = sizes["M"], sizes["K"], sizes["longest"]
    x = torch.randn(m, k, generator=generator, device=device)
    lengths = torch.randint(1, min(longest, k) + 1, (m,), generator=generator, device=device, dtype=torch.int32)
    return [torch.full((m, 1), float("nan"), device=device), x, lengths, longest, 0.5]


SPEC = OpSpec(
    name="two_ladders",
    args=(
        TensorArg("out", ("M", 1), (torch.float32,), mutated=True),
        TensorArg("x", ("M", "K"), (torch.float32,), layout="rows"),
        TensorArg("lengths", ("M",), (torch.int32,)),
        IntArg("longest", minimum=1, ladder=LENGTHS),
        FloatArg("scale"),
    ),
    reference=reference,
    sample=sample,
    shapes=({"K": 64},),
    config_key={"width": "K", "rows": "M", "longest": "longest"},
    ladder=LADDER,
)
