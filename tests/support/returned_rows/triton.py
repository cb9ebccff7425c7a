"""Its host function allocates what it returns, as kernels that exist do."""

import torch
import triton
import triton.language as tl

GENERIC = ("K",)


@triton.jit
def kernel(x, scale, out, total, K, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    s = tl.load(scale + row)
    for start in range(0, K, BLOCK):
        at = start + tl.arange(0, BLOCK)
        y = tl.load(x + row * stride + at, mask=at < K, other=0.0).to(tl.float32) * s
        tl.store(out + row * K + at, y.to(out.dtype.element_ty), mask=at < K)
        tl.atomic_add(total + start // 64 + tl.arange(0, BLOCK // 64), 1, mask=start + tl.arange(0, BLOCK // 64) * 64 < K)


def launch(x, scale, *, config, _launcher):
    out = torch.empty_like(x)
    total = torch.zeros((x.shape[1] + 63) // 64, dtype=torch.int32, device=x.device)
    _launcher(kernel, (x.shape[0],), x, scale, out, total, x.shape[1], x.stride(0), **config)
    return out, total


def candidates(sizes, variant):
    return [{"BLOCK": 256, "num_warps": 4}]
