"""The kernel and its host function, which allocates. Sizes of 1 are sizes as any other."""

import torch
import triton
import triton.language as tl

GENERIC = ("K", "N")


@triton.jit
def kernel(x, y, weights, out, M, N, K, B, BM: tl.constexpr, BN: tl.constexpr):
    batch = tl.program_id(2).to(tl.int64)
    rows, columns = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
    total = tl.zeros((BM, BN), tl.float32)
    for k in range(K):
        a = tl.load(x + batch * M * K + rows * K + k, mask=rows < M, other=0.0)
        b = tl.load(y + batch * K * N + k * N + columns, mask=columns < N, other=0.0)
        total += a[:, None] * b[None, :]
    weight = 0.0
    for i in range(B):
        weight += tl.load(weights + i)
    at = batch * M * N + rows[:, None] * N + columns[None, :]
    tl.store(out + at, total * weight, mask=(rows[:, None] < M) & (columns[None, :] < N))


def launch(x, y, weights, *, config, _launcher):
    (batches, m, k), n = x.shape, y.shape[2]
    out = torch.empty((batches, m, n), dtype=x.dtype, device=x.device)
    grid = ((m + config["BM"] - 1) // config["BM"], (n + config["BN"] - 1) // config["BN"], batches)
    _launcher(kernel, grid, x, y, weights, out, m, n, k, weights.shape[0], **config)
    return out


def candidates(sizes, variant):
    return [{"BM": 16, "BN": 32, "num_warps": 4}]
