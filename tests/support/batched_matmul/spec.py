"""batched_matmul: out [A, M, N] = x [A, M, K] @ y [A, K, N], every B-th batch; all sizes are a call's."""

import torch
from hdispatch.opspec import OpSpec, TensorArg


def reference(x, y, weights, out):
    """out [A, M, N] = x [A, M, K] @ y [A, K, N] * the sum of weights [B]."""
    out.copy_((x.double() @ y.double() * weights.double().sum()).float())


def sample(variant, sizes, device, generator):
    a, b, m, k, n = (sizes[symbol] for symbol in "ABMKN")
    x, y, weights = (torch.randn(s, generator=generator, device=device) for s in ((a, m, k), (a, k, n), (b,)))
    return [x, y, weights, torch.full((a, m, n), float("nan"), device=device)]


SPEC = OpSpec(
    name="batched_matmul",
    args=(
        TensorArg("x", ("A", "M", "K"), (torch.float32,)),
        TensorArg("y", ("A", "K", "N"), (torch.float32,)),
        TensorArg("weights", ("B",), (torch.float32,)),
        TensorArg("out", ("A", "M", "N"), "x", mutated=True, returned=True),
    ),
    reference=reference,
    sample=sample,
    shapes=({},),
    config_key={"rows": "M"},
    ladder=(1, 16, 256),
)
