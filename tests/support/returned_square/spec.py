"""returned_square: a Helion kernel that allocates and returns its result; returned_square_out, given it, is its measure."""

import torch
from hdispatch.opspec import OpSpec, TensorArg


def reference(x, out):
    """out [M, K] = x [M, K] squared."""
    out.copy_(x.float() * x.float())


def sample(variant, sizes, device, generator):
    x = torch.randn((sizes["M"], sizes["K"]), generator=generator, device=device).to(variant.dtypes["x"])
    return [x, torch.full_like(x, float("nan"))]


SPEC = OpSpec(
    name="returned_square",
    args=(
        TensorArg("x", ("M", "K"), (torch.float16,)),
        TensorArg("out", ("M", "K"), "x", mutated=True, returned=True),
    ),
    reference=reference,
    sample=sample,
    shapes=({"K": 256},),
    config_key={"width": "K", "rows": "M"},
    ladder=(1, 16),
)
