"""returned_rows: an op that allocates and returns two tensors, one of them zeroed."""

import torch
from hdispatch.opspec import OpSpec, TensorArg


def reference(x, scale, out, total):
    """out [M, K] = x [M, K] * scale [M]; total [ceil(K/64)] = the number of rows, counted up from zero."""
    out.copy_(x.float() * scale[:, None])
    total.fill_(x.shape[0])


def sample(variant, sizes, device, generator):
    m, k, dtype = sizes["M"], sizes["K"], variant.dtypes["x"]
    x, scale = (torch.randn(shape, generator=generator, device=device) for shape in ((m, k), (m,)))
    total = torch.zeros((k + 63) // 64, dtype=torch.int32, device=device)
    return [x.to(dtype), scale, torch.full((m, k), float("nan"), dtype=dtype, device=device), total]


SPEC = OpSpec(
    name="returned_rows",
    args=(
        TensorArg("x", ("M", "K"), (torch.bfloat16, torch.float32), layout="rows", merge=True),
        TensorArg("scale", ("M",), (torch.float32,)),
        TensorArg("out", ("M", "K"), "x", mutated=True, returned=True),
        TensorArg("total", ("K/64",), (torch.int32,), mutated=True, returned=True, zeroed=True),
    ),
    reference=reference,
    sample=sample,
    shapes=({"K": 256}, {}),
    config_key={"width": "K", "rows": "M"},
    ladder=(1, 16),
)
